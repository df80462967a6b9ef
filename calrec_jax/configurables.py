"""What gin may bind, by name: the one table between configuration files and the code, which knows nothing of gin.

`parse` reads the files and the command line's bindings, and refuses what gin itself would pass over in silence.
"""

import copy
import difflib
import functools
import inspect
import logging
import pathlib
import re
import tokenize
from collections.abc import Callable, Sequence
from typing import Any

import gin

from calrec_jax import runs, storage
from calrec_jax.errors import UserError
from calrec_jax.evaluation.dense import dense_metrics
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.inference.generate import generate
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.plan.planning import PlanOptions
from calrec_jax.plan.programs import Inference, Training
from calrec_jax.ranking.bm25 import Bm25Options
from calrec_jax.ranking.rankers import RankerOptions
from calrec_jax.text.batches import RowOptions
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary
from calrec_jax.training.inputs import Inputs
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.trainer import Schedule, train

CONFIGURABLES = {
    'text': ItemTemplate, 'vocabulary': load_vocabulary, 'inputs': Inputs, 'rows': RowOptions, 'decoder': DecoderConfig,
    'objective': Objective, 'optimizer': Optimizer, 'mesh': MeshShape, 'schedule': Schedule,
    'dense_metrics': dense_metrics, 'train': train,
    'sample': generate, 'rankers': RankerOptions, 'infer': runs.infer, 'bm25': Bm25Options, 'ranking': evaluate,
    'evaluate': runs.rank, 'plan': PlanOptions}

VERBS = ('train', 'infer', 'evaluate')  # T5X's scripts have functions of these names: beside them ours are not to be registered
for _name, _target in CONFIGURABLES.items():
  if _name not in VERBS:
    gin.external_configurable(_target, name=_name, module='calrec')


@functools.cache
def _register_verbs() -> None:
  for name in VERBS:
    gin.external_configurable(CONFIGURABLES[name], name=name, module='calrec')


def search_paths() -> list[str]:
  """Where `gin/...` is found: the working folder, the checkout, the installed package."""
  package = pathlib.Path(__file__).parent
  return ['', str(package.parent), str(package)]


def parse(gin_files: Sequence[str], paths: Sequence[str], bindings: Sequence[str], *, whole: bool = True) -> None:
  """Reads gin files in turn, then bindings (`NAME=VALUE`). Raises UserError for anything that does not apply.

  `whole`: whether every macro that is read must be set.
  """
  _register_verbs()
  gin.clear_config()
  # gin keeps search paths for the life of the process; ours are of this call.
  gin.config._LOCATION_PREFIXES[:] = [*paths, *search_paths()]
  for file in gin_files:
    _parse(lambda file=file: gin.parse_config_file(str(storage.local(file))), f'--gin_file={file}')
  for binding in bindings:
    _parse(lambda binding=binding: gin.parse_config(binding), f'--gin.{binding}')
  _check_macros(whole)


def run(name: str) -> Any:
  """Calls the configured function; it can ask for the operative configuration, for the record."""
  return gin.get_configurable(f'calrec.{name}')(gin_text=gin.operative_config_str)


def training_settings() -> tuple[Training, MeshShape]:
  """What of a training run's configuration its program depends on, and its mesh. Neither data nor vocabulary is read."""
  build = lambda name: gin.get_configurable(f'calrec.{name}')()
  training = Training(
      decoder=build('decoder'), objective=build('objective'), rows=build('rows'), optimizer=build('optimizer'),
      lengths=value('inputs', 'task_feature_lengths'), batch_size=value('train', 'batch_size'),
      microbatches=value('train', 'microbatches'), head_block=value('train', 'head_block'), frozen=value('train', 'frozen'))
  return training, build('mesh')


def inference_settings(training: Training) -> Inference:
  """What of the configuration sampling depends on, with the lengths of the training."""
  return Inference(users=value('sample', 'users_per_batch'), samples=value('sample', 'n_samples'),
                   prefix=training.lengths['inputs'], text=value('sample', 'max_new_tokens') or training.lengths['targets'])


def plan_options() -> PlanOptions:
  """How to plan."""
  return gin.get_configurable('calrec.plan')()


def value(name: str, parameter: str) -> Any:
  """What is bound to a parameter, or its default. Raises UserError where there is neither."""
  try:
    return copy.deepcopy(gin.query_parameter(f'calrec.{name}.{parameter}'))  # a copy of a macro is its value
  except ValueError:
    default = inspect.signature(CONFIGURABLES[name]).parameters[parameter].default
    if default is inspect.Parameter.empty:
      raise UserError(f'{name}.{parameter} is not set: add the run file, such as --gin_file=gin/runs/stage1.gin.') from None
    return default


def _parse(read: Callable[[], object], where: str) -> None:
  try:
    logging.disable(logging.ERROR)  # gin tells of every folder in which a file is not
    read()
  except OSError as error:
    raise UserError(f'{where}: {_one_line(error)}') from error
  except (ValueError, SyntaxError, tokenize.TokenError, ImportError, AttributeError, KeyError, TypeError) as error:
    message = _one_line(error)
    if match := re.search(r"No configurable matching (?:reference )?'@?([^'()]*)", message):
      message = f'nothing is called {match[1]!r}{_suggestion(match[1], CONFIGURABLES)}; gin binds {", ".join(CONFIGURABLES)}'
    elif isinstance(error, (SyntaxError, tokenize.TokenError)) or 'malformed' in message:
      message += '; a text needs quotes inside the argument, such as --gin.MODEL_DIR=\'"runs/stage1"\''
    raise UserError(f'{where}: {message}') from error
  finally:
    logging.disable(logging.NOTSET)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:400] or type(error).__name__


def _suggestion(name: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(name, list(known), 1)
  return f' (is it {close[0]!r}?)' if close else ''


def _check_macros(whole: bool) -> None:
  """Every macro that is set must be read by something; of a `whole` configuration every macro that is read must be set."""
  bound = {scope: values.get('value') for (scope, selector), values in gin.config._CONFIG.items() if selector == 'gin.macro'}
  read = {reference.config_key[0] for reference in gin.config.iterate_references(gin.config._CONFIG)
          if reference.config_key[1] == 'gin.macro'}
  for name in sorted(bound.keys() - read):
    raise UserError(f'{name} is set, but nothing reads it{_suggestion(name, read)}; this run reads {", ".join(sorted(read))}.')
  required = ('gin.REQUIRED', 'gin.constant')
  missing = sorted(name for name in read if name not in bound or getattr(bound[name], 'config_key', None) == required)
  if missing and whole:
    raise UserError(f'{", ".join(missing)}: required; add --gin.{missing[0]}=VALUE (a text has quotes of its own: '
                    f'--gin.{missing[0]}=\'"..."\').')
