"""The `calrec` command: one thin verb a job. Only the standard library is imported until a verb runs, so help is instant."""

import argparse
import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from calrec_jax import data_verbs, evaluation_verbs, plan_verb, quiet_tensorflow, storage
from calrec_jax.data_verbs import Outcome
from calrec_jax.errors import UserError

DESCRIPTION = """\
CALRec in JAX: finetune a pretrained decoder so that it writes the next item a shopper will buy, then find that item in the
catalogue. The verbs, in the order in which one uses them:"""

GIN_HELP = """\
Options of a run are gin bindings. --gin_file may be repeated, later files win; files are looked for in the working folder, in
--gin_search_paths, and in the package. --gin.NAME=VALUE sets a macro or a binding; VALUE is a Python literal, so that a text
has quotes of its own: --gin.MODEL_DIR='"runs/stage1"'.
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command line; returns the exit code: 0 done, 1 a serious finding (`audit`), 2 wrong input (one line on stderr)."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  bindings = [a.removeprefix('--gin.') for a in arguments if a.startswith('--gin.')]
  options = parser().parse_args([a for a in arguments if not a.startswith('--gin.')])
  options.bindings = bindings
  logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
  for noisy in ('absl', 'apache_beam', 'jax', 'orbax', 'tensorflow'):
    logging.getLogger(noisy).setLevel(logging.WARNING)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  os.environ.setdefault('EPATH_USE_TF', '0')  # Orbax reaches buckets by fsspec, as `storage` does: one login, one set of errors
  try:
    if bindings and not hasattr(options, 'gin_file'):
      raise UserError(f'--gin.{bindings[0]}: `calrec {options.verb}` takes no gin bindings.')
    if unequal := [b for b in bindings if '=' not in b]:
      raise UserError(f'--gin.{unequal[0]}: write --gin.NAME=VALUE.')
    _check_buckets(options)
    result, text = options.run(options)
  except UserError as error:
    # gin adds lines about where the call was configured.
    message = str(error).split('\n  In call to configurable')[0].replace('\n', ' ')
    print(f'calrec: error: {message}', file=sys.stderr)
    return 2
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    what = 'no space is left' if error.errno == errno.ENOSPC else error.strerror.lower()
    print(f'calrec: error: {error.filename or "the disk"}: {what}; make room, and run the same command again.', file=sys.stderr)
    return 2
  except RuntimeError as error:
    from calrec_jax.training import preemption
    if not preemption.is_lost_peer(error):
      raise
    print(f'calrec: error: another process of this run is gone ({str(error).splitlines()[0][:120]}); start all of them again: '
          'the same command goes on from the newest checkpoint.', file=sys.stderr, flush=True)
    os._exit(preemption.PREEMPTED)  # an ordinary exit would wait for that process
  except KeyboardInterrupt:
    print('calrec: interrupted.', file=sys.stderr)
    return 130
  if options.json or text:
    print(json.dumps(result, ensure_ascii=False) if options.json else text)
  return getattr(options, 'code', 0)


def _import(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.pretrained import importing, t5x_checkpoints
  if t5x_checkpoints.find(options.source):
    if (options.dtype, options.eos_token, options.bos_token) != ('auto', None, None):
      raise UserError(f'{options.source}: is a checkpoint of T5X, which brings its type and vocabulary; leave --dtype, '
                      '--eos_token and --bos_token out.')
    report = t5x_checkpoints.import_checkpoint(options.source, options.out)
    return report, (f'Wrote {report["out"]}: {report["parameters"]:,} parameters of step {report["step"]}; '
                    f"train with --gin_file={report['out']}/{importing.GIN_FILE} and "
                    f"--gin.INITIAL_CHECKPOINT_PATH='\"{report['out']}\"'.")
  report = importing.import_model(options.source, options.out, dtype=options.dtype, eos_token=options.eos_token,
                                  bos_token=options.bos_token)
  return report, (
      f'{report["name"]}: {report["architecture"]}, {report["parameters"]:,} parameters, {report["layers"]} layers, licence '
      f'{report["license"] or "not stated"}.\n'
      f'Vocabulary: {report["vocabulary"]:,} tokens for {report["embedding_rows"]:,} rows; '
      f'a text begins with {report["bos"] or "nothing"} and ends with {report["eos"]}.\n'
      f'Wrote {report["out"]}, in {report["dtype"]}: '
      f"train with --gin_file={report['out']}/{importing.GIN_FILE}, --gin.INITIAL_CHECKPOINT_PATH='\"{report['out']}\"' and "
      f"--gin.VOCABULARY='\"{report['out']}/vocabulary.json\"'.")


def _export(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.pretrained import exporting, importing, t5x_checkpoints
  if options.format == 't5x':
    if options.metrics:
      raise UserError('--metrics: go into the model card of a Hugging Face folder; leave it out with --format t5x.')
    report = t5x_checkpoints.export_checkpoint(options.checkpoint, options.out)
    return report, (f'Wrote {report["checkpoint"]}: {report["parameters"]:,} parameters, for T5X; give '
                    f'--gin_file={report["out"]}/{importing.GIN_FILE} after a file of gin/t5x.')
  report = exporting.export_model(options.checkpoint, options.out, metrics=options.metrics)
  return report, (f'Wrote {report["out"]}: {report["architecture"]}, {report["parameters"]:,} parameters of {report["dtype"]} '
                  f'in {report["files"]} file(s), for transformers.AutoModelForCausalLM.')


def _score(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.inference import loading, score
  report = score.score_text(loading.load(options.checkpoint), options.text)
  rows = zip(report['token_ids'], report['tokens'], report['logprobs'], strict=True)
  lines = [f'{i:>8}  {"":>10}  {token!r}' if logprob is None else f'{i:>8}  {logprob:>10.4f}  {token!r}'
           for i, token, logprob in rows]
  return report, '\n'.join([*lines, f'sum of log-probabilities: {sum(report["logprobs"][1:]):.4f} nats'])


def _index(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.inference import loading
  from calrec_jax.outputs import check_unused
  from calrec_jax.ranking import index
  check_unused(options.out)
  old = index.load_index(options.old) if options.old else None
  made = index.build_index(*index.read_catalogue(options.catalogue), loading.load(options.checkpoint), old=old)
  made.save(options.out)
  report = {'out': options.out, 'items': len(made.catalogue), 'texts': made.trie.n_texts, 'nodes': len(made.trie.lows_N),
            'checkpoint': options.checkpoint}
  return report, f'Wrote {options.out}: {report["items"]} items of {report["texts"]} texts.'


def _recommend(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.inference import loading
  from calrec_jax.ranking import index, rankers
  from calrec_jax.ranking.recommender import Filters, Recommender
  in_stock = None
  if options.in_stock:
    try:
      in_stock = storage.local(options.in_stock).read_text(encoding='utf-8').split('\n')
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'{options.in_stock}: cannot be read ({type(error).__name__}); give a text file with an item id a line.'
                      ) from error
  filters = Filters(options.category, options.exclude_seen, None if in_stock is None else [line.strip() for line in in_stock])
  names = rankers.check_names((options.ranker,))
  loaded = loading.load(options.checkpoint)
  if index.is_index(options.catalogue):
    catalogue = index.load_index(options.catalogue)
  else:
    embed = 'dense' in rankers.needed_by(names, rankers.DEFAULTS.shortlist)
    catalogue = index.build_index(*index.read_catalogue(options.catalogue), loaded, embed=embed)
  recommender = Recommender(loaded, catalogue, options=rankers.RankerOptions(fusion=options.fusion), seed=options.seed)

  def recommend(history: list[str], user: str | None) -> list:
    return recommender.recommend([history], options.top, ranker=options.ranker, filters=filters,
                                 user_ids=None if user is None else [user], skip_unknown=options.skip_unknown)[0]
  if options.history == '-':
    recommender.recommend([], options.top, ranker=options.ranker, filters=filters)  # before any line: do the options fit?
    _answer_lines(recommend)
    options.json = False  # the answers are JSON, and nothing else is printed
    return None, ''
  found = recommend([item for item in options.history.split(',') if item], options.user)
  return [vars(each) for each in found], _recommendations(found)


def _answer_lines(recommend: Callable[[list[str], str | None], list]) -> None:
  """Answers each JSON line of stdin, {"history": [...], "user_id": ...}, by one on stdout."""
  for number, line in enumerate(sys.stdin.buffer, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      history, user = row['history'], row.get('user_id')
      ids = [*history, *([] if user is None else [user])]
      if not isinstance(history, list) or not all(isinstance(each, str) for each in ids):
        raise ValueError
      ''.join(ids).encode()  # raises ValueError: halves of surrogate pairs are no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      raise UserError(f'line {number} of the input: expected {{"history": ["item_id", ...], "user_id": "..."}}.') from None
    try:
      answer = {'recommendations': [vars(each) for each in recommend(history, user)]}
    except UserError as error:  # of this line alone: the others have their answers
      answer = {'error': str(error)}
    print(json.dumps({'user_id': user, **answer}, ensure_ascii=False), flush=True)


def _recommendations(found: list) -> str:
  """A table of items with their scores and reasons."""
  from calrec_jax.printable import printable
  cut = lambda text, width: text if len(text) <= width else text[:width - 1] + '…'
  rows = [('item', 'score', 'title', 'reason'), *((cut(printable(each.item_id), 24), f'{each.score:.4f}', cut(printable(
      each.title), 48), cut(printable(each.reason), 100)) for each in found)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _configured(verb: str) -> Callable[[argparse.Namespace], Any]:
  """Runs the function that gin knows by the verb's name."""
  def run(options: argparse.Namespace) -> Any:
    if not options.gin_file:
      raise UserError(f'`calrec {verb}` needs --gin_file; see `calrec {verb} --help`.')
    if os.environ.get('CALREC_DISTRIBUTED') == '1':  # one of several workers, each with some of the devices
      from calrec_jax.training import preemption
      preemption.join_processes()
    quiet_tensorflow.load()
    from calrec_jax import configurables
    configurables.parse(options.gin_file, options.gin_search_paths.split(',') if options.gin_search_paths else [],
                        options.bindings)
    return configurables.run(verb)
  return run


def _train(options: argparse.Namespace) -> Outcome:
  if options.profile:
    options.bindings.append('schedule.profile_steps=3')
  metrics = _configured('train')(options)
  validation = ', '.join(f'{name} {value:.4f}' for name, value in metrics.items())
  return metrics, f'Trained; validation {validation}.' if metrics else 'Trained.'


def _infer(options: argparse.Namespace) -> Outcome:
  report = _configured('infer')(options)
  return report, '\n'.join(f'{name}: {value}' for name, value in report.items())


def _evaluate(options: argparse.Namespace) -> Outcome:
  from calrec_jax.evaluation import compare
  from calrec_jax.evaluation.evaluate import table
  compare.check(options.beside)  # before the work
  metrics = _configured('evaluate')(options)
  text = table(metrics) + ('\n' + metrics['examples'] if metrics.get('examples') else '')
  if options.beside:
    from calrec_jax import configurables
    out = configurables.value('evaluate', 'out')
    if storage.is_bucket(out):
      raise UserError(f'{out}: is evaluated; copy it to this machine to compare it with others, by `calrec compare`.')
    comparison = compare.compare([out, *options.beside])
    metrics, text = metrics | {'beside': comparison}, f'{text}\n\n{compare.table(comparison)}'
  return metrics, text


def _check_buckets(options: argparse.Namespace) -> None:
  """Raises UserError where a verb is given a path in a bucket that works in folders alone."""
  given = {'import': ['source'], 'download': ['out'],
           'evaluate': ['beside'],
           **dict.fromkeys(('synthesize', 'compare', 'audit', 'report', 'ablate', 'export'), vars(options))}
  values = [value for name in given.get(options.verb, ()) for value in (
      vars(options)[name] if isinstance(vars(options)[name], list) else [vars(options)[name]])]
  if found := [value for value in values if isinstance(value, str) and storage.is_bucket(value.split('=')[-1].strip('\'"'))]:
    raise UserError(f'{found[0]}: `calrec {options.verb}` works in folders of this machine; copy it here first, such as with '
                    '`gcloud storage cp --recursive`.')


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line."""

  def error(self, message: str) -> None:
    self.exit(2, f'{self.prog}: error: {message}; see `{self.prog} --help`.\n')


def parser() -> argparse.ArgumentParser:
  """The whole command line."""
  root = _Parser(prog='calrec', description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 epilog='`calrec VERB --help` has the options and an example.', allow_abbrev=False)
  verbs = root.add_subparsers(dest='verb', required=True, metavar='VERB')

  data_verbs.add(verbs, _verb, _positive)
  verb = _verb(verbs, 'import', _import, 'turn a pretrained model into a checkpoint to start from',
               'calrec import --from SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2')
  verb.add_argument('--from', required=True, dest='source', metavar='DIR_OR_GGUF',
                    help='Hugging Face folder (config.json, safetensors, tokenizer), GGUF file, or T5X run (or its '
                    'checkpoint_<step>)')
  verb.add_argument('--out', required=True, help='checkpoint to write')
  verb.add_argument('--dtype', default='auto', choices=('auto', 'float32', 'bfloat16'),
                    help='of the weights; auto: bfloat16 if the source has nothing else (default %(default)s)')
  verb.add_argument('--eos_token', help='text of the token that ends a text (default: as the tokenizer says)')
  verb.add_argument('--bos_token', help="text of the token that begins a text, '' for none (default: as the tokenizer says)")

  for name, run, about, example in (
      ('train', _train, 'finetune one stage; the same command resumes it',
       "calrec train --gin_file=gin/models/tiny.gin --gin_file=gin/runs/stage1.gin --gin.MODEL_DIR='\"runs/stage1\"' \\\n"
       "      --gin.DATA_DIR='\"data\"' --gin.VOCABULARY='\"data/vocabulary.json\"' --gin.TRAIN_STEPS=500"),
      ('infer', _infer, 'sample item texts for every user; the same command resumes it',
       "calrec infer --gin_file=gin/runs/infer.gin --gin.CHECKPOINT_PATH='\"runs/stage2\"' --gin.DATA_DIR='\"data\"' \\\n"
       "      --gin.MIXTURE_OR_TASK_NAME='\"gift_cards\"' --gin.INFER_OUTPUT_DIR='\"runs/infer\"'"),
      ('evaluate', _evaluate, 'rank the whole catalogue for every user, and judge the rankings',
       "calrec evaluate --gin_file=gin/runs/evaluate.gin --gin.INFER_OUTPUT_DIR='\"runs/infer\"' --gin.DATA_DIR='\"data\"' \\\n"
       "      --gin.MIXTURE_OR_TASK_NAME='\"gift_cards\"' --gin.EVAL_OUTPUT_DIR='\"runs/evaluate\"'")):
    verb = _verb(verbs, name, run, about, example, more=GIN_HELP)
    verb.add_argument('--gin_file', action='append', default=[], metavar='FILE', help='gin file; may be repeated')
    verb.add_argument('--gin_search_paths', default='', metavar='DIR,DIR', help='more folders to look for gin files in')
    if name == 'evaluate':
      verb.add_argument('--beside', nargs='+', default=[], metavar='RUN', help='what evaluate or baselines wrote: '
                        'all in one table with 95 %% intervals, as by `calrec compare`')
    if name == 'train':
      verb.add_argument('--profile', action='store_true', help='trace three steps for TensorBoard, into MODEL_DIR/profile')

  _ranking_verbs(verbs)
  evaluation_verbs.add(verbs, _verb, _positive, GIN_HELP)
  plan_verb.add(verbs, _verb, _positive, GIN_HELP)
  verb = _verb(verbs, 'score', _score, "show a text's tokens and their log-probabilities, to see that an import is right",
               "calrec score --checkpoint runs/smollm2 --text 'The capital of France is Paris.'")
  verb.add_argument('--checkpoint', required=True, help='MODEL_DIR, imported model, or the folder of one step')
  verb.add_argument('--text', required=True, help='what is read')
  verb = _verb(verbs, 'export', _export, 'write a checkpoint as a Hugging Face folder, with a tokenizer and a card, or for T5X',
               'calrec export --checkpoint runs/stage2 --out exported --metrics runs/evaluate/metrics.json')
  verb.add_argument('--checkpoint', required=True, help='MODEL_DIR, imported model, or the folder of one step')
  verb.add_argument('--out', required=True, help='folder to write')
  verb.add_argument('--format', default='huggingface', choices=('huggingface', 't5x'), help='(default %(default)s)')
  verb.add_argument('--metrics', metavar='FILE', help='metrics.json of `calrec evaluate`, for the model card')
  return root


def _ranking_verbs(verbs: Any) -> None:
  verb = _verb(verbs, 'index', _index, "index a catalogue for the rankers: BM25, the trie of its texts, the texts' embeddings",
               'calrec index --catalogue data/gift_cards --checkpoint runs/stage2 --out runs/index')
  verb.add_argument('--catalogue', required=True, metavar='ITEMS', help='items file, or a histories folder')
  verb.add_argument('--checkpoint', required=True, help='MODEL_DIR, imported model, or the folder of one step')
  verb.add_argument('--out', required=True, help='folder to write')
  verb.add_argument('--old', metavar='INDEX', help='an index whose items need not be computed again; the rankings are the same')
  verb = _verb(verbs, 'recommend', _recommend, 'recommend items for a purchase history',
               'calrec recommend --checkpoint runs/stage2 --catalogue runs/index --history B001,B002 --exclude_seen\n'
               '  calrec recommend --checkpoint runs/stage2 --catalogue runs/index --history - < histories.jsonl')
  verb.add_argument('--checkpoint', required=True, help='MODEL_DIR, imported model, or the folder of one step')
  verb.add_argument('--catalogue', required=True, metavar='ITEMS', help='index, or what `calrec index` makes one of')
  verb.add_argument('--history', required=True, metavar='ID,ID,...',
                    help='items in time order; -: JSON lines {"history": [...], "user_id": ...} on stdin, an answer each')
  verb.add_argument('--user', metavar='ID', help='on which, and on the seed, the sampling depends (default: on the history)')
  verb.add_argument('--top', type=_positive, default=10, metavar='N', help='items (default %(default)s)')
  verb.add_argument('--ranker', default='bm25', help='bm25, constrained, dense, likelihood or fused (default %(default)s)')
  verb.add_argument('--fusion', metavar='FILE', help='weights of fused: fusion.json of `calrec infer` on the validation split')
  verb.add_argument('--category', help='only items of this category, or with this level in theirs')
  verb.add_argument('--exclude_seen', action='store_true', help='no items of the history')
  verb.add_argument('--in_stock', metavar='FILE', help='only these items, an id a line')
  verb.add_argument('--skip_unknown', action='store_true', help='pass over items of the history that the catalogue lacks')
  verb.add_argument('--seed', type=int, default=0, help='of the sampling (default %(default)s)')


def _verb(verbs: Any, name: str, run: Callable, about: str, example: str, more: str = '') -> argparse.ArgumentParser:
  verb = verbs.add_parser(name, help=about, description=f'{about[0].upper()}{about[1:]}.', allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f'{more}\nexample:\n  {example}')
  verb.add_argument('--json', action='store_true', help='print the result as JSON on stdout, and nothing else there')
  verb.set_defaults(run=run)
  return verb


def _positive(text: str) -> int:
  if not re.fullmatch(r'[1-9]\d*', text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
  return int(text)


if __name__ == '__main__':
  sys.exit(main())
