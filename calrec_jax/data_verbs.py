"""The verbs of data: `calrec download`, `synthesize`, `prepare`, `describe`, `vocabulary`, `cache`. Imports are late."""

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import Any

from calrec_jax import outputs, quiet_tensorflow
from calrec_jax.errors import UserError

Outcome = tuple[Any, str]  # what --json prints, what is printed else
# Flags of `prepare histories` that say how to read a table of events.
OF_EVENTS = ('user_column', 'item_column', 'time_column', 'rating_column', 'item_columns', 'time_unit', 'min_count',
             'min_rating', 'dedup', 'unknown_items', 'all_items', 'memory_limit', 'threads', 'tmp_dir')


def _download_amazon(options: argparse.Namespace) -> Outcome:
  from calrec_jax.data import download
  plan = download.plan_amazon(options.year, options.category, out=options.out, five_core=options.five_core,
                              ratings=options.ratings, mirror=options.mirror)
  if plan.asks:
    print(plan.text, file=sys.stderr, flush=True)
    if not options.yes and not _agrees():
      return None, 'Nothing was fetched.'
  report = download.fetch(plan)
  return report, download.format_report(report)


def _agrees() -> bool:
  """Asks at the terminal. UserError: there is none."""
  if not sys.stdin.isatty():
    raise UserError('nothing was fetched, as there is no terminal to ask at; read the terms above, and give --yes to fetch.')
  print('Fetch them? [y/N] ', end='', file=sys.stderr, flush=True)
  return sys.stdin.readline().strip().lower() in ('y', 'yes')


def _synthesize(options: argparse.Namespace) -> Outcome:
  from calrec_jax.data import synthetic
  report = synthetic.synthesize(options.out, users=options.users, items=options.items, categories=options.categories,
                                seed=options.seed)
  return report, f'Wrote {options.categories} categories to {options.out}.'


def _prepare_dumps(options: argparse.Namespace) -> Outcome:
  from calrec_jax.data import amazon, describe, dump_folders
  settings = {name: getattr(options, name) for name in (
      'min_count', 'core', 'min_length', 'max_bad_lines', 'ties', 'split', 'dedup', 'since', 'until', 'verified_only',
      'min_rating', 'no_price', 'category_depth', 'csv_columns', 'threads', 'memory_limit', 'tmp_dir')}
  if options.dumps is None:
    if not options.reviews or not options.name or options.categories:
      raise UserError('give --reviews and --name for one data set, or --dumps (and --categories) for a folder of them.')
    description = amazon.prepare_dumps(options.reviews, options.meta, name=options.name, out=options.out, **settings)
    return description, describe.format_description(description)
  if options.reviews or options.meta or options.name:
    raise UserError(f'--dumps {options.dumps}: finds reviews, metadata and names; leave out --reviews, --meta and --name.')
  descriptions = list(dump_folders.prepare(options.dumps, options.out, options.categories, **settings))
  return descriptions, describe.format_descriptions(descriptions)


def _prepare_histories(options: argparse.Namespace) -> Outcome:
  from calrec_jax.data import columns, describe, events, histories
  common = {'name': options.name, 'out': options.out, 'min_length': options.min_length, 'max_bad_lines': options.max_bad_lines,
            'ties': options.ties, 'split': options.split}
  if options.sequences:
    if foreign := [flag for flag in OF_EVENTS if getattr(options, flag) not in (None, False)]:
      raise UserError(f'--{foreign[0]}: belongs to --events; ready sequences are taken as they are.')
    description = histories.prepare(options.sequences, options.items, **common)
  else:
    given = {flag: getattr(options, flag) for flag in OF_EVENTS if getattr(options, flag) is not None}
    description = events.prepare_events(
        options.events, options.items, **common, item_columns=columns.parse_item_columns(given.pop('item_columns', [])),
        event_columns={role: given.pop(f'{role}_column') for role in columns.EVENT_NAMES if f'{role}_column' in given}, **given)
  return description, describe.format_description(description)


def _describe(options: argparse.Namespace) -> Outcome:
  if options.vocabulary:
    quiet_tensorflow.load()
  from calrec_jax.description import describe, page, tables
  if options.html:
    outputs.check_absent(options.html)
  found = describe.describe(options.dataset, vocabulary=options.vocabulary, length=options.length,
                            item_length=options.item_length,
                            template=_item_template(options))
  if options.html:
    page.write(found, options.html)
  return found, tables.as_text(found) + (f'\n\nWrote {options.html}.' if options.html else '')


def _vocabulary(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.data import histories
  from calrec_jax.text import vocabularies
  template = _item_template(options)
  outputs.check_absent(options.out)
  texts = [template.item_text(item) for folder in options.data for item in histories.load(folder).items]
  vocabulary = vocabularies.train_vocabulary(texts, size=options.size, phrases=vocabularies.template_phrases(template))
  vocabulary.save(options.out)
  report = {'out': options.out, 'size': vocabulary.vocab_size, 'texts': len(texts), 'fingerprint': vocabulary.fingerprint}
  return report, f'Wrote {options.out}: {vocabulary.vocab_size} tokens, trained on {len(texts)} item texts.'


def _cache(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.tasks import caching
  template = _item_template(options)
  try:
    beam = None if options.beam is None else shlex.split(options.beam)
  except ValueError as error:
    raise UserError(f'--beam: {error}; quote the options as for a shell.') from error
  reports = [caching.cache(folder, options.out, vocabulary=options.vocabulary, template=template, targets=options.targets,
                           beam=beam) for folder in options.data]
  lines = [f'{"Wrote" if each["cached"] else "Nothing to do, there already:"} {each["out"]}: ' + ', '.join(
      f'{split} {each["examples"][split]:,} examples in {n:,} file{"s" * (n > 1)}' for split, n in each['shards'].items()) + '.'
           for each in reports]
  return reports, '\n'.join(lines)


def _item_template(options: argparse.Namespace) -> Any:
  """What the options of `_template` say."""
  from calrec_jax.text.templates import FIELDS, ItemTemplate
  return ItemTemplate(fields=tuple(options.fields or FIELDS), unknown=options.unknown)


def add(verbs: Any, make: Callable[..., argparse.ArgumentParser], positive: Callable[[str], int]) -> None:
  """Adds the verbs to a command line.

  Args:
    verbs: the subparsers.
    make: as `cli._verb`.
    positive: the type of a whole number above 0.
  """
  kinds = verbs.add_parser('download', help='fetch published dumps', allow_abbrev=False).add_subparsers(
      dest='kind', required=True, metavar='KIND')
  verb = make(kinds, 'amazon', _download_amazon, 'fetch reviews and metadata of the Amazon releases from their publishers',
              'calrec download amazon --year 2018 --category Gift_Cards --five_core --out dumps',
              'Says the addresses, sizes and terms, and asks, before it fetches. The same command goes on after a stop.')
  verb.add_argument('--year', type=positive, required=True, help='2014, 2018 or 2023')
  verb.add_argument('--category', nargs='+', required=True, metavar='NAME', help='as the publishers write it: Gift_Cards')
  verb.add_argument('--out', required=True, metavar='DIR', help='folder for the files, and downloads.json')
  verb.add_argument('--five_core', action='store_true', help="reviews of the publishers' 5-core (2023: ratings without texts)")
  verb.add_argument('--ratings', action='store_true', help='ratings in the place of reviews: far smaller files, without texts')
  verb.add_argument('--yes', action='store_true', help='do not ask')
  verb.add_argument('--mirror', metavar='URL', help="an address to fetch from in place of the publishers', with the same paths")

  verb = make(verbs, 'synthesize', _synthesize, 'write a generated store as raw dumps in the Amazon 2018 format',
               'calrec synthesize --out runs/store --users 1000 --items 250 --categories 3 --seed 0')
  verb.add_argument('--out', required=True, help='folder to write')
  verb.add_argument('--users', type=positive, default=1000, help='users a category (default %(default)s)')
  verb.add_argument('--items', type=positive, default=250, help='items a category (default %(default)s)')
  verb.add_argument('--categories', type=positive, default=3, help='categories (default %(default)s)')
  verb.add_argument('--seed', type=int, default=0, help='of the generator (default %(default)s)')

  _add_prepare(verbs, make, positive)

  verb = make(verbs, 'describe', _describe, 'count what a data set is like: lengths, popularity, repeats, ties, texts',
              'calrec describe data/gift_cards --vocabulary data/vocabulary.json --length 512 --html gift_cards.html')
  verb.add_argument('dataset', metavar='DATASET', help='histories folder')
  verb.add_argument('--vocabulary', metavar='FILE', help='count tokens too, and what a context cuts')
  verb.add_argument('--length', type=positive, default=512, metavar='N',
                    help="tokens of a history with its target, TASK_FEATURE_LENGTHS together (default %(default)s)")
  verb.add_argument('--item_length', type=positive, default=64, metavar='N',
                    help="most tokens of an item, TASK_FEATURE_LENGTHS' 'targets' (default %(default)s)")
  verb.add_argument('--html', metavar='FILE', help='write a page with charts, too')
  _template(verb)

  verb = make(verbs, 'vocabulary', _vocabulary, "train a small tokenizer on catalogues' texts",
               'calrec vocabulary --data data/gift_cards --size 1024 --out data/vocabulary.json')
  verb.add_argument('--data', nargs='+', required=True, metavar='DIR', help='histories folders')
  verb.add_argument('--size', type=positive, default=4096, help='most tokens (default %(default)s)')
  verb.add_argument('--out', required=True, help='file to write')
  _template(verb)
  _add_cache(verbs, make)


def _add_prepare(verbs: Any, make: Callable[..., argparse.ArgumentParser], positive: Callable[[str], int]) -> None:
  prepare = verbs.add_parser('prepare', help='turn dumps, or a log of your own, into a histories folder', allow_abbrev=False)
  kinds = prepare.add_subparsers(dest='kind', required=True, metavar='KIND')
  verb = make(kinds, 'dumps', _prepare_dumps, 'raw review and metadata dumps (Amazon 2014, 2018, 2023)',
               'calrec prepare dumps --reviews Gift_Cards_5.json.gz --meta meta_Gift_Cards.json.gz \\\n'
               '      --name gift_cards --out data/gift_cards\n'
               '  calrec prepare dumps --dumps downloads --categories Gift_Cards Video_Games --out data')
  verb.add_argument('--reviews', nargs='+', metavar='FILE', help='reviews, or ratings only; the content tells the format')
  verb.add_argument('--meta', nargs='+', default=[], metavar='FILE', help='metadata dumps')
  verb.add_argument('--dumps', metavar='DIR', help='instead: a folder of both; each category becomes OUT/<name in lower case>, '
                    'unless it has been made of the same files by the same rules')
  verb.add_argument('--categories', nargs='+', metavar='NAME', help='of --dumps only these (default: all that have reviews)')
  verb.add_argument('--min_count', type=int, default=5, help='k of the k-core, users and items; 0: none (default %(default)s)')
  verb.add_argument('--core', default='iterative', help='iterative, or once: by the counts before (default %(default)s)')
  verb.add_argument('--dedup', default='consecutive', help="of a user's events with one item these go: consecutive ones; none; "
                    'or, with first, all but the first (default %(default)s)')
  verb.add_argument('--since', metavar='TIME', help='events from then on: a day such as 2015-01-31 (UTC), or seconds')
  verb.add_argument('--until', metavar='TIME', help='events before then')
  verb.add_argument('--verified_only', action='store_true', help='verified purchases only')
  verb.add_argument('--min_rating', type=float, metavar='STARS', help='events with so many stars or more only')
  verb.add_argument('--no_price', action='store_true', help='leave prices out')
  verb.add_argument('--category_depth', type=positive, metavar='N', help='keep the N broadest levels of a category')
  verb.add_argument('--csv_columns', metavar='NAMES', help='of a CSV without a header, such as user,item,rating,time (default: '
                    'told by the ids)')
  _of_duckdb(verb, positive)
  _prepared(verb, several=True)
  verb = make(kinds, 'histories', _prepare_histories, 'your own log: ready sequences, or a table of events; MovieLens, RecBole',
               'calrec prepare histories --sequences sequences.jsonl.gz --items items.jsonl.gz \\\n'
               '      --name shop --out data/shop\n'
               '  calrec prepare histories --events events.csv --items items.csv --item_columns title=name,category=genre \\\n'
               '      --name shop --out data/shop')
  log = verb.add_mutually_exclusive_group(required=True)
  log.add_argument('--sequences', metavar='FILE', help='JSON lines {"user_id", "item_ids": [...]}, a line a user, or Parquet')
  log.add_argument('--events', nargs='+', metavar='FILE', help='rows of a user, an item and a time: CSV, TSV, JSON lines '
                   '(gzipped or not), Parquet, a file of MovieLens, or .inter of RecBole')
  verb.add_argument('--items', required=True, metavar='FILE', help='{"item_id", "title", "category", "brand", "price"} as JSON '
                    'lines or Parquet; beside --events also in any form that events may have')
  _prepared(verb)
  _of_events(verb.add_argument_group('of --events'), positive)


def _add_cache(verbs: Any, make: Callable[..., argparse.ArgumentParser]) -> None:
  verb = make(verbs, 'cache', _cache, "write Tasks' tokenized examples to disk, as SeqIO and T5X read them (USE_CACHED_TASKS)",
               'calrec cache --data data/gift_cards data/shop --vocabulary data/vocabulary.json --out cache\n'
               "  calrec cache --data data/shop --vocabulary data/vocabulary.json --out cache \\\n"
               "      --beam='--runner=FnApiRunner --direct_num_workers=4 --direct_running_mode=multi_processing'",
               '`calrec train` needs no cache. See docs/data.md.')
  verb.add_argument('--data', nargs='+', required=True, metavar='DIR', help='histories folders')
  verb.add_argument('--vocabulary', required=True, metavar='FILE', help='as VOCABULARY in the runs')
  verb.add_argument('--out', required=True, metavar='DIR', help='folder of caches; each Task is a folder in it')
  verb.add_argument('--targets', default='last', help="spans of the train split, last or all, as T5X's CALRecModel.targets "
                    '(default %(default)s)')
  verb.add_argument('--beam', metavar='OPTIONS', help='run on Apache Beam with these pipeline options, in quotes (default: '
                    'here, in one process)')
  _template(verb)


def _template(verb: argparse.ArgumentParser) -> None:
  verb.add_argument('--fields', nargs='+', help='as text.fields in the runs (default: all)')
  verb.add_argument('--unknown', default='write', help='as text.unknown in the runs (default %(default)s)')


def _of_events(group: Any, positive: Callable[[str], int]) -> None:
  for role in ('user', 'item', 'time', 'rating'):
    group.add_argument(f'--{role}_column', metavar='NAME', help=f'column of the {role} (default: told by usual names)')
  group.add_argument('--item_columns', nargs='+', metavar='WHAT=NAME', help='columns of the items file for item_id, title, '
                     'category, brand, price, such as title=name,category=genre; nothing behind = for none')
  group.add_argument('--time_unit', help='seconds, milliseconds, microseconds, nanoseconds, dates (ISO 8601), or auto: told by '
                     'the whole column (default auto)')
  group.add_argument('--min_count', type=int, help='k of the k-core, users and items (default 0: none)')
  group.add_argument('--min_rating', type=float, help='events with a lower rating are dropped (default: all stay)')
  group.add_argument('--dedup', help='of a user\'s events of one item these go: consecutive ones (consecutive), all but the '
                     'first (first), or none (none) (default consecutive)')
  group.add_argument('--unknown_items', help='items with events and without texts: refuse, keep, or drop their events '
                     '(default refuse)')
  group.add_argument('--all_items', action='store_true', default=None, help='keep items without events too')
  _of_duckdb(group, positive)


def _of_duckdb(verb: Any, positive: Callable[[str], int]) -> None:
  verb.add_argument('--threads', type=positive, metavar='N', help="DuckDB's (default: all cores); the result is the same")
  verb.add_argument('--memory_limit', metavar='SIZE', help="DuckDB's, such as 2GB (default: 80 %% of the memory)")
  verb.add_argument('--tmp_dir', metavar='DIR', help='where DuckDB works on disk (default: beside OUT)')


def _prepared(verb: argparse.ArgumentParser, *, several: bool = False) -> None:
  verb.add_argument('--name', required=not several, help='of the data set, and of its SeqIO Task')
  verb.add_argument('--out', required=True, help='histories folder to write; let it be DATA_DIR/NAME'
                    + (' (with --dumps: DATA_DIR)' if several else ''))
  verb.add_argument('--min_length', type=int, default=3, help='shorter histories are dropped (default %(default)s)')
  verb.add_argument('--max_bad_lines', type=int, default=0, help='broken lines that are passed over (default %(default)s)')
  verb.add_argument('--ties', default='dump', help='order of events of one time: dump, or hashed (default %(default)s)')
  verb.add_argument('--split', default='leave_one_out', help='leave_one_out, or time: 80 %% of the events to train on, 10 %% '
                    'to validate, 10 %% to test (default %(default)s)')
