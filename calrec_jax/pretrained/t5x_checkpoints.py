"""Checkpoints of T5X runs: their weights become a checkpoint of this project, and back. T5X itself is not needed.

`RUN/checkpoint_<step>/state` is a tree of Orbax, `target` (the parameters) and `state` (step, optimizer). Beside it lie
`calrec.json` and `vocabulary.json`, which say what the weights are of: gin/t5x/stage1.gin has them written.
"""

import contextlib
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from calrec_jax import outputs
from calrec_jax.errors import UserError
from calrec_jax.inference.loading import load
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.pretrained.importing import GIN_FILE, gin_text
from calrec_jax.pretrained.tensors import Path, flat_shapes
from calrec_jax.text.vocabularies import load_vocabulary
from calrec_jax.training import checkpoints

_STEP = re.compile(r'checkpoint_(\d+)')
_STATE = 'state'


def find(path: str | os.PathLike) -> pathlib.Path | None:
  """The folder of one step: `path` itself, or the newest one in it; None if `path` is nothing of T5X."""
  path = pathlib.Path(path).absolute()
  if _STEP.fullmatch(path.name):
    return path if path.is_dir() else None
  there = [found for found in path.iterdir() if _STEP.fullmatch(found.name)] if path.is_dir() else []
  return max(there, key=lambda found: int(_STEP.fullmatch(found.name)[1]), default=None)


def import_checkpoint(source: str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
  """Writes the folder `out`, a checkpoint that a run can start from, of a T5X run's weights; `model.gin` is its shape.

  Args:
    source: MODEL_DIR of the T5X run (its newest step), or the folder `checkpoint_<step>` in it.
    out: the folder to write.

  Returns:
    `step`, `parameters`, `out`.

  Raises:
    UserError: no such checkpoint, one that is damaged or of another model, or `out` is there.
  """
  folder = find(source)
  if folder is None:
    raise UserError(f'{source}: holds no checkpoint of T5X; give its MODEL_DIR, or the folder checkpoint_<step> in it.')
  run, step = folder.parent, int(_STEP.fullmatch(folder.name)[1])
  about = run / checkpoints.T5X_DESCRIPTION_FILE
  if not about.exists():
    raise UserError(f'{about}: is not there, so nothing says what the weights are of; train with gin/t5x/stage1.gin, or bind '
                    'train.summarize_config_fn as it does.')
  description = outputs.read_object(about)
  vocabulary = load_vocabulary(run / checkpoints.VOCABULARY_FILE)
  try:
    config = DecoderConfig(**description['decoder'])
    if vocabulary.fingerprint != description['vocabulary']:
      raise UserError(f'{run / checkpoints.VOCABULARY_FILE}: is not the vocabulary of that run; restore the file.')
  except (KeyError, TypeError) as error:
    raise UserError(f'{about}: does not describe a run ({error}); restore the file.') from error
  params = _read(folder / _STATE, config)
  with outputs.new_folder(out) as scratch:
    checkpoints.write_params(scratch, {'decoder': traverse_util.unflatten_dict(params)}, description | {'t5x_step': step})
    vocabulary.save(scratch / checkpoints.VOCABULARY_FILE)
    parameters = _write_gin(scratch, run.name, config, description.get('pretrained'))
  return {'step': step, 'parameters': parameters, 'out': str(out)}


def export_checkpoint(checkpoint: str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
  """Writes the folder `out` with `checkpoint_<step>`, from which T5X starts, infers or evaluates: weights, float32.

  Low-rank factors are merged. `out/model.gin` is the shape, which T5X has to be given.

  Args:
    checkpoint: a run's folder (its newest step), an imported model, or the folder of one step.
    out: the folder to write.

  Returns:
    `step`, `parameters`, `checkpoint` (the folder of the step), `out`.

  Raises:
    UserError: no checkpoint, a damaged one, or `out` is there.
  """
  outputs.check_unused(out)
  loaded = load(checkpoint)
  found, config = loaded.found, loaded.decoder.config
  name, description = f'checkpoint_{found.step}', found.description | {'decoder': config.shape(), 'data': None}
  state = {'target': {'decoder': jax.tree.map(np.asarray, loaded.params)}, 'state': {'step': np.asarray(found.step, np.int32)}}
  with outputs.new_folder(out) as scratch:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(scratch.absolute() / name / _STATE, args=ocp.args.PyTreeSave(state))
    loaded.vocabulary.save(scratch / checkpoints.VOCABULARY_FILE)
    outputs.write_json(scratch / checkpoints.T5X_DESCRIPTION_FILE, description)
    parameters = _write_gin(scratch, found.model_dir.name, config, found.description.get('pretrained'))
  return {'step': found.step, 'parameters': parameters, 'checkpoint': str(pathlib.Path(out) / name), 'out': str(out)}


def _write_gin(folder: pathlib.Path, name: str, config: DecoderConfig, pretrained: dict[str, Any] | None) -> int:
  """Writes the gin file of the shape; returns the number of parameters."""
  parameters = sum(int(np.prod(leaf.shape)) for leaf in flat_shapes(config).values())
  about = {'name': name, 'architecture': 'calrec', 'license': None, **(pretrained or {}), 'parameters': parameters}
  (folder / GIN_FILE).write_text(gin_text(config, about), encoding='utf-8')
  return parameters


def _read(state: pathlib.Path, config: DecoderConfig) -> dict[Path, np.ndarray]:
  """The decoder's parameters, float32. UserError unless the tree has them all, in their shapes, and no others."""
  wanted = {('target', 'decoder', *path): leaf for path, leaf in flat_shapes(config).items()}
  item = traverse_util.unflatten_dict(wanted)
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float32), item)
  # The handler alone: a Checkpointer warns of a file that T5X keeps in another place.
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    try:
      there = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(handler.metadata(state).tree).items()
               if path[0] == 'target'}
    except Exception as error:  # Orbax and TensorStore raise many kinds for what is not theirs
      raise _damaged(state, error) from error
    _check(state, there, {path: leaf.shape for path, leaf in wanted.items()})
    try:
      read = handler.restore(state, args=ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True))
    except Exception as error:
      raise _damaged(state, error) from error
  return traverse_util.flatten_dict(read['target']['decoder'])


def _check(state: pathlib.Path, there: dict[Path, tuple[int, ...]], wanted: dict[Path, tuple[int, ...]]) -> None:
  for path in wanted:
    name = '/'.join(path[1:])
    if path not in there:
      raise UserError(f'{state}: the parameter {name} is missing; the weights and calrec.json are not of one run.')
    if there[path] != wanted[path]:
      raise UserError(f'{state}: {name} has the shape {there[path]}, by calrec.json it is {wanted[path]}; they are not of one '
                      'run.')
  if strange := sorted('/'.join(path[1:]) for path in there.keys() - wanted.keys()):
    raise UserError(f'{state}: {len(strange)} parameters are not of this decoder, such as {strange[0]}; another kind of model '
                    'cannot be imported.')


def _damaged(state: pathlib.Path, error: Exception) -> UserError:
  reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
  return UserError(f'{state}: is not a whole checkpoint of T5X in the form of Orbax ({reason}); give another step.')
