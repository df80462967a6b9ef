"""What a run goes on from: its newest checkpoint, another run's weights, or random ones; and whether it may."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from calrec_jax import storage
from calrec_jax.errors import UserError
from calrec_jax.models import lora
from calrec_jax.models.decoder import boxed_params
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.training import checkpoints, partitioning, trainable
from calrec_jax.training.best import Best
from calrec_jax.training.train_step import TrainState
from calrec_jax.training.trainable import IsTrained


def settings(**options: Any) -> dict[str, Any]:
  """What a run's numbers depend on, by the names that gin knows, as JSON has it."""
  flat = {}
  for name, value in options.items():
    if dataclasses.is_dataclass(value):
      flat |= {f'{name}.{field}': found for field, found in dataclasses.asdict(value).items()}
    else:
      flat[name] = value
  return flat


def _check_changes(model_dir: pathlib.Path, there: dict[str, Any], here: dict[str, Any], allowed: bool) -> None:
  """Raises UserError where a run in this folder was begun with other data or settings, unless that is allowed."""
  def facts(found: dict[str, Any]) -> dict[str, Any]:
    factors = {name: value for name, value in found['decoder'].items() if name.startswith('lora')}
    known = ('data', 'rates', 'task_feature_lengths', 'seed', 'optimizer', 'frozen')
    chosen = found.get('settings', {})
    averages = chosen.get('optimizer.average_decay', 0) > 0
    return {name: found[name] for name in known if name in found} | {'decoder': factors, 'averages': averages} | chosen
  old, new = facts(there), facts(here)
  changed = {name: f'{name} is {old[name]} there, {new[name]} here' for name in old if name in new and old[name] != new[name]}
  if not changed:
    return
  listed = '; '.join(changed.values())
  # With these the checkpoint's arrays are others, and cannot be read.
  other_arrays = changed.keys() & {'optimizer', 'optimizer.state_dtype', 'averages', 'frozen', 'decoder'}
  if allowed and not other_arrays:
    logging.warning('Goes on with other settings: %s.', listed)
    return
  way_out = '' if other_arrays else ', or go on all the same with --gin.train.allow_changes=True'
  raise UserError(f'{model_dir}: this run was begun with other {", ".join(changed)} ({listed}); choose another MODEL_DIR'
                  f'{way_out}.')


def check_folder(model_dir: str) -> None:
  """Raises UserError for a folder that holds something other than a training run."""
  folder = storage.place(model_dir)
  if folder.exists() and not folder.is_dir():
    raise UserError(f'{folder}: is a file; choose another MODEL_DIR.')
  if folder.is_dir() and any(folder.iterdir()) and not (folder / checkpoints.VOCABULARY_FILE).exists():
    raise UserError(f'{folder}: the folder is in use, and not by a training run; choose another MODEL_DIR.')


def lineage(model_dir: str, initial_checkpoint: str | None) -> dict[str, Any] | None:
  """The pretrained model that a run goes back to, as `calrec import` described it; None if there is none."""
  begun = checkpoints.newest_step(model_dir) is not None
  source = model_dir if begun else initial_checkpoint
  return checkpoints.find(source).description.get('pretrained') if source else None


def parts(state: TrainState, trained: IsTrained) -> tuple[Any, dict[str, Any]]:
  """(`params`, `rest`) of a checkpoint: the parameters that the run is about, and what else it goes on from."""
  rest = {'step': state.step, 'rng': state.rng, 'opt_state': state.opt_state}
  if state.average is None:
    return state.params, rest
  # Parameters that are not trained are the same in both.
  return state.judged, rest | {'trained': trainable.split(state.params, trained)[0]}


def _joined(params: Any, rest: dict[str, Any], trained: IsTrained) -> TrainState:
  """The state that `parts` took apart."""
  if 'trained' not in rest:
    return TrainState(params=params, **rest)
  rest = dict(rest)
  moving = rest.pop('trained')
  return TrainState(params=trainable.join(params, moving), average=trainable.split(params, trained)[0], **rest)


def restore_or_start(model_dir: pathlib.Path, make_state: Callable[[], TrainState], shardings: TrainState,
                     initial_checkpoint: str | None, decoder: DecoderConfig, trained: IsTrained, description: dict[str, Any],
                     allow_changes: bool, best: Best) -> tuple[TrainState, Best]:
  """The state to go on from: this run's newest checkpoint, else the weights of `initial_checkpoint`, else random weights.

  And the best evaluation of the run up to there, if it was by the same metric as `best`.
  """
  expected = {'decoder': decoder, 'vocabulary': description['vocabulary'], 'template': description['template']}
  target = jax.eval_shape(make_state)
  abstract_params = checkpoints.abstract(target.params, shardings.params)
  if checkpoints.newest_step(model_dir) is not None:
    found = checkpoints.find(model_dir)
    if found.description['data'] is None:
      raise UserError(f'{model_dir}: holds an imported model; choose another MODEL_DIR, and give this one as '
                      'INITIAL_CHECKPOINT_PATH.')
    checkpoints.check_fits(found, **expected)
    _check_changes(model_dir, found.description, description, allow_changes)
    abstract_rest = checkpoints.abstract(parts(target, trained)[1], parts(shardings, trained)[1])
    restored = checkpoints.load(found, params=abstract_params, rest=abstract_rest)
    logging.info('Goes on from step %d of %s.', found.step, model_dir)
    there = found.description.get('best') or {}
    return _joined(**restored, trained=trained), Best(**there) if there.get('metric') == best.metric else best
  if initial_checkpoint is None:
    return make_state(), best
  found = checkpoints.find(initial_checkpoint)
  checkpoints.check_fits(found, **expected)
  logging.info('Starts from the weights of step %d of %s.', found.step, found.model_dir)
  theirs = found.decoder_config(param_dtype=decoder.param_dtype, user_half_life=decoder.user_half_life)
  if theirs.shape() == decoder.shape():  # factors, if there are any, are trained on
    return make_state(checkpoints.load(found, params=abstract_params)['params']), best
  boxed = {'decoder': boxed_params(theirs)}
  mesh = jax.tree.leaves(shardings.params)[0].mesh
  there = checkpoints.abstract(nn.unbox(boxed), partitioning.shardings(boxed, mesh))
  # What was loaded has no name here: merged weights replace it, and memory holds one of the two when the state is made.
  return make_state({'decoder': lora.merge(checkpoints.load(found, params=there)['params']['decoder'], theirs)[0]}), best
