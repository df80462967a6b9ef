"""The verb `calrec plan`. As in `cli.py`, imports are late."""

import argparse
from collections.abc import Callable
from typing import Any

from calrec_jax import quiet_tensorflow
from calrec_jax.errors import UserError


def _plan(options: argparse.Namespace) -> tuple[Any, str]:
  if not options.gin_file:
    raise UserError('`calrec plan` needs --gin_file; see `calrec plan --help`.')
  quiet_tensorflow.load()
  from calrec_jax import configurables
  from calrec_jax.plan import planning, text, topology
  topology.prepare()
  paths = options.gin_search_paths.split(',') if options.gin_search_paths else []
  given = {'BATCH_SIZE': options.global_batch, 'plan.topology': options.topology and repr(options.topology),
           'plan.tries': options.tries, 'plan.price': options.price}
  bindings = [f'{name}={value}' for name, value in given.items() if value is not None]
  configurables.parse(options.gin_file, paths, [*options.bindings, *bindings], whole=False)
  how = configurables.plan_options()
  if how.topology is None:
    raise UserError('--topology is missing: such as --topology v5e:2x4, or a file of gin/tpu, which names its own.')
  where, (training, mesh) = topology.parse(how.topology), configurables.training_settings()
  reports = planning.suggest(training, where, mesh, how.tries)
  if not reports[0]['fits']:
    raise UserError(_too_large(reports[0], planning.smallest_that_fits(training, where)))
  result = {'training': reports, 'epoch': _epoch(options.targets, how.price, reports[0])}
  if options.infer:
    result['inference'] = planning.plan_inference(training, where, configurables.inference_settings(training))
  return result, text.as_text(result)


def _too_large(report: dict, fitting: Any) -> str:
  memory = report['memory']
  advice = f'{fitting} is the smallest slice on which it fits' if fitting else 'no larger slice helps with this batch'
  return (f'{report["topology"]}: the step needs {memory["total"] / 1e9:.2f} GB of the {memory["capacity"] / 1e9:.2f} GB of a '
          f'device, {(memory["total"] - memory["capacity"]) / 1e9:.2f} GB too much, on the best mesh that was tried '
          f'{tuple(report["mesh"].values())}; {advice}. Or set decoder.remat, train.microbatches, decoder.param_dtype or a '
          'smaller BATCH_SIZE.')


def _epoch(targets: int | None, price: float | None, best: dict) -> dict[str, float | None] | None:
  """What an epoch takes and costs, if that is asked for."""
  if targets is None:
    return None
  hours = targets / best['spans_per_second'] / 3600
  return {'targets': targets, 'hours': hours, 'dollars': None if price is None else hours * best['chips'] * price}


def add(verbs: Any, make: Callable[..., argparse.ArgumentParser], positive: Callable[[str], int], gin_help: str) -> None:
  """Adds the verb to a command line; see `evaluation_verbs.add`."""
  verb = make(verbs, 'plan', _plan, 'compile a run for a TPU topology, without a TPU: does it fit, and how fast can it be',
              'calrec plan --gin_file=gin/models/gemma3_1b.gin --gin_file=gin/runs/stage1.gin --topology v5e:4x8',
              more='MODEL_DIR, DATA_DIR and VOCABULARY are not needed: nothing is read.\n' + gin_help)
  verb.add_argument('--gin_file', action='append', default=[], metavar='FILE', help='of the training run; may be repeated')
  verb.add_argument('--gin_search_paths', default='', metavar='DIR,DIR', help='where gin files are looked for too')
  verb.add_argument('--topology', help="CHIP:SHAPE, or CHIP:SHAPE*SLICES (default: the gin files' plan.topology)")
  verb.add_argument('--global_batch', type=positive, metavar='ROWS', help="in place of the gin files' BATCH_SIZE")
  verb.add_argument('--tries', type=positive, metavar='N',
                    help='meshes that are compiled: the one that is set, then the most promising (default 3)')
  verb.add_argument('--infer', action='store_true', help='prefill and decoding too')
  verb.add_argument('--targets', type=positive, metavar='N', help='training targets of an epoch, as `calrec train` counts them')
  verb.add_argument('--price', type=float, metavar='DOLLARS', help='of a chip and hour')
