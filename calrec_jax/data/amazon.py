"""Dumps of the Amazon Review Data of 2014, 2018 and 2023 become a histories folder.

The steps, in this order (method: Data):
  1. The events as published: one a line of the review files; a review published twice is two events. Each file's format and
     unit of time are told by its content (`dump_formats`).
  2. Where asked for (`dump_rules`): only events of a span of time, of verified purchases, of a least number of stars.
  3. Iterative k-core: users and items with fewer than `min_count` events go, until none is left to go, or `once`.
  4. A user's events are ordered by (time, line), or (time, hash, line); several files count as one, in the order given.
     Times in milliseconds order events as such, and are kept as whole seconds, rounded down.
  5. Of consecutive events of one user with one item the first stays; or of all of them, or none goes (`dedup`).
  6. Histories shorter than `min_length` go.
  7. Items: those that a history holds, by id. Of an item's lines in the metadata the first with a usable title counts
     (usable: `cleaning.clean_text` leaves something of it), else its first line. No line: all attributes unknown.

DuckDB reads and joins (`dump_tables`), on disk where memory is short. What it makes does not depend on threads or memory.
"""

import os
from collections.abc import Iterator, Sequence

import duckdb
import tqdm

from calrec_jax import outputs
from calrec_jax.data import database, dump_tables, filtering, histories, time_order
from calrec_jax.data.dump_rules import Rules
from calrec_jax.errors import UserError


def prepare_dumps(reviews: Sequence[str | os.PathLike], meta: Sequence[str | os.PathLike] = (), *, name: str,
                  out: str | os.PathLike, threads: int | None = None, memory_limit: str | None = None,
                  tmp_dir: str | os.PathLike | None = None, progress: bool = True, **rules: object) -> dict:
  """Makes the histories folder `out` from review files and, if there are any, metadata files.

  Where `out` is what these files and rules make, nothing is done (`histories.made_before`).

  Args:
    reviews: reviews, or ratings only, in any of the formats of `dump_formats`, gzipped or not.
    meta: metadata likewise.
    name: of the data set.
    out: the new folder; it appears whole or not at all.
    threads: of DuckDB; None: one for each core. The data set does not depend on it, nor on the next two.
    memory_limit: of DuckDB, such as '2GB'; None: 80 % of the memory. What does not fit is kept on disk.
    tmp_dir: where DuckDB works; None: beside `out`.
    progress: whether to show progress on stderr.
    **rules: `dump_rules.Rules`.

  Returns:
    The description, as in dataset.json; `describe.format_description` prints it.

  Raises:
    UserError: bad input, nothing left, no room, or `out` in use.
  """
  histories.check_name(name)
  chosen = Rules(**rules)
  if not reviews:
    raise UserError('No review file is given; name at least one.')
  metadata_lines = lambda found: sum(source['lines'] for source in found['sources'][len(reviews):])
  if known := histories.made_before(out, [*reviews, *meta], name=name, options=chosen.options(), progress=progress,
                                    agrees=lambda found: found.get('metadata', {}).get('lines', 0) == metadata_lines(found)):
    return known
  with outputs.new_folder(out) as scratch:
    bar = tqdm.tqdm(total=len(reviews) + len(meta) + 3, desc=f'preparing {name}', leave=False, delay=1,
                    disable=not progress)
    with bar, database.connect(tmp_dir or scratch, threads=threads, memory_limit=memory_limit) as (connection, work):
      dumps = dump_tables.Dumps(connection, work, chosen, bar)
      dumps.read_reviews(reviews)
      steps = _filter(connection, bar, chosen, n_bad=dumps.n_bad)
      similar = filtering.similar_ids(connection)
      arrays = filtering.arrays(connection)
      bar.update()
      items, metadata = dumps.read_items(meta, arrays['item_ids'])
      data = histories.Histories(name, arrays['user_ids'], arrays['item_ids'], items, arrays['offsets'],
                                 arrays['events'], arrays['timestamps'],
                                 time_order.cutoffs(arrays['timestamps'], name) if chosen.split == 'time' else None)
    return histories.write(scratch, data, {
        'sources': dumps.sources,
        'options': chosen.options(),
        'steps': steps,
        'bad_lines': dumps.n_bad,
        **({'similar_ids': similar} if any(similar.values()) else {}),
        **({'metadata': metadata} if meta else {}),
    })


def _filter(connection: duckdb.DuckDBPyConnection, bar: tqdm.tqdm, rules: Rules, *, n_bad: int) -> list[dict]:
  """Filters the table events down to the histories, in the table histories(user, item, time, rank).

  Returns what each step left and dropped. Raises UserError, naming the step, when nothing is left.
  """
  steps = filtering.Steps(connection)
  steps.count('read', 'events', f'the review files hold no event ({n_bad} bad lines)')
  for step, condition, cure in _conditions(rules):
    connection.execute(f'DELETE FROM events WHERE NOT coalesce({condition}, false)')
    steps.count(step, 'events', cure)
  if rules.core == 'iterative':
    filtering.k_core(connection, rules.min_count)
    steps.count(f'k-core, at least {rules.min_count} events', 'events', 'give a smaller --min_count, or more reviews')
  else:
    filtering.frequent(connection, rules.min_count)
    steps.count(f'at least {rules.min_count} events, once', 'events', 'give a smaller --min_count, or more reviews')
  bar.update()
  filtering.drop_repeats(connection, rules.ties, rules.dedup)
  dropped = {'consecutive': 'consecutive duplicates', 'first': 'all duplicates', 'none': 'duplicates, which stay'}
  steps.count(dropped[rules.dedup], 'histories', 'a bug')
  filtering.drop_short(connection, rules.min_length)
  steps.count(f'histories shorter than {rules.min_length}', 'histories', 'give a smaller --min_length, or more reviews')
  bar.update()
  return steps.rows


def _conditions(rules: Rules) -> Iterator[tuple[str, str, str]]:
  """(step, what its events fulfil as SQL, cure if none does) of each filter of single events that is asked for."""
  if rules.since is not None:
    yield f'since {rules.since} s', f'time >= {rules.since}', 'give an earlier --since'
  if rules.until is not None:
    yield f'until {rules.until} s', f'time < {rules.until}', 'give a later --until'
  if rules.verified_only:
    yield ('verified purchases', 'verified',
           'leave out --verified_only (dumps of 2014 and of ratings do not say which purchases are verified)')
  if rules.min_rating is not None:
    yield f'at least {rules.min_rating:g} stars', f'rating >= {float(rules.min_rating)!r} AND NOT isnan(rating)', (
        'give a smaller --min_rating')
