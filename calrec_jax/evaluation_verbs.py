"""The verbs that judge: `calrec baselines`, `compare`, `audit`, `report`, `ablate`. As in `cli.py`, imports are late."""

import argparse
from collections.abc import Callable
from typing import Any

from calrec_jax import quiet_tensorflow
from calrec_jax.data_verbs import Outcome
from calrec_jax.errors import UserError


def _baselines(options: argparse.Namespace) -> Outcome:
  from calrec_jax.data import histories
  from calrec_jax.evaluation import baseline_run
  from calrec_jax.evaluation.baselines.sasrec import SasrecOptions
  from calrec_jax.evaluation.evaluate import table
  from calrec_jax.evaluation.protocols import Protocol
  from calrec_jax.text.templates import ItemTemplate
  protocol = Protocol(options.protocol, options.split, options.seen_items, options.min_history, options.max_users)
  result = baseline_run.run_baselines(
      histories.load(options.dataset), options.out, protocol=protocol, methods=options.methods or baseline_run.METHODS,
      template=ItemTemplate(), sasrec_options=SasrecOptions(seed=options.seed))
  return result, table(result)


def _compare(options: argparse.Namespace) -> Outcome:
  from calrec_jax.evaluation import compare
  comparison = compare.compare(options.runs, metric=options.metric, metrics=options.metrics, baseline=options.baseline,
                               resamples=options.resamples, seed=options.seed)
  return comparison, compare.table(comparison)


def _ablate(options: argparse.Namespace) -> Outcome:
  if not options.gin_file:
    raise UserError('`calrec ablate` needs --gin_file; see `calrec ablate --help`.')
  from calrec_jax import ablations
  from calrec_jax.evaluation.compare import table
  result = ablations.ablate(options.gin_file, options.over, task=options.task, out=options.out, seeds=options.seeds,
                            bindings=options.bindings, method=options.method, metric=options.metric)
  return result, table(result)


def _audit(options: argparse.Namespace) -> Outcome:
  quiet_tensorflow.load()
  from calrec_jax.evaluation.audit import audit, findings
  result = audit.audit(options.dataset, options.runs, checkpoint=options.checkpoint)
  options.code = int(result['serious'] > 0)
  return result, findings.as_text(result)


def _report(options: argparse.Namespace) -> Outcome:
  if options.data:
    quiet_tensorflow.load()  # which the audit imports
  from calrec_jax.evaluation.report.report import report
  result = report(options.runs, options.out, data=options.data, n_examples=options.examples)
  told = f'Wrote {result["out"]}: {result["methods"]} methods, {result["examples"]} of {result["users"]} users in full.'
  return result, '\n'.join([told, *(f'note: {note}' for note in result['notes'])])


def add(verbs: Any, make: Callable[..., argparse.ArgumentParser], positive: Callable[[str], int], gin_help: str) -> None:
  """Adds the verbs to a command line.

  Args:
    verbs: the subparsers.
    make: as `cli._verb`.
    positive: the type of a whole number above 0.
    gin_help: about gin bindings.
  """
  verb = make(verbs, 'baselines', _baselines, 'rank with popularity, item-KNN, SASRec and others, and judge the rankings',
               'calrec baselines data/gift_cards --out runs/baselines')
  verb.add_argument('dataset', metavar='DATASET', help='histories folder')
  verb.add_argument('--out', required=True, help='evaluation folder to write')
  verb.add_argument('--methods', nargs='+', metavar='NAME', help='only these (default: all)')
  verb.add_argument('--split', default='test', help='test or validation (default %(default)s)')
  verb.add_argument('--protocol', default='leave_one_out_full', help='leave_one_out_full, time_split_full, cold_items or '
                    'leave_one_out_sampled (default %(default)s)')
  verb.add_argument('--seen_items', default='kept', help='kept, or filtered: no candidates (default %(default)s)')
  verb.add_argument('--min_history', type=int, default=3, help='shorter histories are left out (default %(default)s)')
  verb.add_argument('--max_users', type=positive, help='only the first so many')
  verb.add_argument('--seed', type=int, default=0, help="of SASRec's training (default %(default)s)")
  verb = make(verbs, 'compare', _compare, 'put evaluations into one table, and say which of their differences hold',
              'calrec compare runs/evaluate runs/other --metric ndcg@10\n'
              '  calrec compare small=runs/seed0 small=runs/seed1 small=runs/seed2 large=runs/large:calrec --baseline large',
              more='RUN is [NAME=]FOLDER[:METHOD]. Several folders of one NAME are seeds of it. Without METHOD all methods\n'
                   'of the folder are compared; one that ranks the same in several folders appears once.\n')
  verb.add_argument('runs', nargs='+', metavar='RUN', help='folders that `calrec evaluate` or `calrec baselines` wrote')
  verb.add_argument('--metric', default='ndcg@10', help='whose differences are shown (default %(default)s)')
  verb.add_argument('--metrics', nargs='+', default=['recall@10', 'ndcg@10', 'mrr'], metavar='METRIC',
                    help='columns of the table (default recall@10 ndcg@10 mrr)')
  verb.add_argument('--baseline', metavar='NAME', help='method to which the others are compared (default: the best)')
  verb.add_argument('--resamples', type=positive, default=10_000, help='of the users (default %(default)s)')
  verb.add_argument('--seed', type=int, default=0, help='of the resamples (default %(default)s)')
  verb = make(verbs, 'audit', _audit, 'look for leaks: what a data set, or a run on it, lets a model know of held-out events',
              'calrec audit data/gift_cards runs/evaluate --checkpoint runs/stage2',
              more='exit code: 1 if a finding is serious, 0 if none is, 2 for wrong input.\n')
  verb.add_argument('dataset', metavar='DATASET', help='histories folder that models are judged on')
  verb.add_argument('runs', nargs='*', metavar='RUN', help='training runs, outputs of infer and evaluate, indexes, or other '
                    'histories folders; those that their records lead to are audited too')
  verb.add_argument('--checkpoint', help="MODEL_DIR, or the folder of one step: a few users' texts are scored anew with it")
  verb = make(verbs, 'report', _report, 'show evaluations and training runs as one HTML file',
              'calrec report runs/evaluate runs/stage2 --data data/gift_cards --out report.html')
  verb.add_argument('runs', nargs='+', metavar='RUN', help='[NAME=]FOLDER: what evaluate, baselines or train wrote')
  verb.add_argument('--out', required=True, metavar='FILE', help='HTML file to write')
  verb.add_argument('--data', metavar='DIR', help='histories folder of the evaluations: for titles, histories and the audit')
  verb.add_argument('--examples', type=int, default=200, metavar='N', help='users shown in full (default %(default)s)')
  verb = make(verbs, 'ablate', _ablate, 'train, infer and evaluate a run and changed copies of it, over seeds, into one table',
               "calrec ablate --gin_file=gin/models/tiny.gin --gin_file=gin/runs/stage2.gin --over gin/ablations/no_*.gin \\\n"
               "      --task gift_cards --out runs/ablation --seeds 3 --gin.DATA_DIR='\"data\"' ...", more=gin_help)
  verb.add_argument('--gin_file', action='append', default=[], metavar='FILE', help='of the training run; may be repeated')
  verb.add_argument('--over', nargs='+', required=True, metavar='FILE', help='gin files, each a change of the run')
  verb.add_argument('--task', required=True, help='data set of the users that are inferred for and judged')
  verb.add_argument('--out', required=True, help='folder of all runs; the same command goes on')
  verb.add_argument('--seeds', type=positive, default=3, help='of training and sampling (default %(default)s)')
  verb.add_argument('--method', default='calrec', help='whose rankings are compared: calrec, dense, ... (default %(default)s)')
  verb.add_argument('--metric', default='ndcg@10', help='of the differences (default %(default)s)')
