"""Checkpoints: one atomic folder a step, with weights, optimizer, step, RNG, and what they belong to.

`MODEL_DIR/checkpoints/<step>/` holds three items: `params`, `rest` (step, RNG key, optimizer state) and `description`
(decoder shape, vocabulary, texts, lengths, data, gin text, versions). A half-written step has another name and is not seen.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from calrec_jax import storage
from calrec_jax.errors import UserError
from calrec_jax.models.decoder_config import DecoderConfig

FOLDER = 'checkpoints'
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in TensorStore's messages
BEST = 'best'  # after a run's folder: its best step
VOCABULARY_FILE = 'vocabulary.json'
T5X_DESCRIPTION_FILE = 'calrec.json'  # of a run that T5X trains


@dataclasses.dataclass(frozen=True)
class Found:
  """A whole checkpoint on disk: the run's folder, the step, and its description."""

  model_dir: pathlib.Path
  step: int
  description: dict[str, Any]

  @property
  def folder(self) -> pathlib.Path:
    return self.model_dir / FOLDER / str(self.step)

  @property
  def vocabulary_path(self) -> pathlib.Path:
    return self.model_dir / VOCABULARY_FILE

  def decoder_config(self, **changes: Any) -> DecoderConfig:
    """The shape that was trained; `changes` set what is not part of the shape (dtype, remat, dropout)."""
    return DecoderConfig(**{**self.description['decoder'], **changes})


def write_params(model_dir: str | pathlib.Path, params: Any, description: dict[str, Any]) -> None:
  """Writes weights that were not trained here as step 0 of the folder of a run: numpy arrays, of which no copy is made."""
  folder = pathlib.Path(model_dir).absolute() / FOLDER / '0'
  # Uncompressed and not copied first: the memory that is needed is that of the arrays.
  handlers = type_handlers.create_type_handler_registry(
      (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)), (jax.Array, type_handlers.ArrayHandler()))
  handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=handlers)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder / 'params', args=ocp.args.PyTreeSave(params))
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    checkpointer.save(folder / 'description', args=ocp.args.JsonSave(description))
  for whole in (folder / 'params', folder / 'description', folder):  # the folder may be copied to a bucket
    (whole / storage.COMMIT_SUCCESS_FILE).write_text('whole')


class Checkpoints:
  """Writes the checkpoints of one run, in the background. As a context it waits for them when it ends.

  The newest `keep` are kept, and the best.
  """

  def __init__(self, model_dir: str | pathlib.Path, *, keep: int = 3, best_step: int | None = None):
    self._model_dir, self._keep, self._best_step = model_dir, keep, best_step
    options = ocp.CheckpointManagerOptions(preservation_policy=self, enable_async_checkpointing=True,
                                           cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(storage.place(model_dir) / FOLDER, options=options,
                                          item_names=('params', 'rest', 'description'))

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Which of the checkpoints, oldest first, stay: Orbax asks for it."""
    oldest = len(checkpoints) - self._keep
    return [i >= oldest or found.step == self._best_step for i, found in enumerate(checkpoints)]

  def save(self, step: int, params: Any, rest: Any, description: dict[str, Any], best_step: int | None = None) -> None:
    """Begins to write a step; returns before it is on disk. `best_step` is the best one so far."""
    self.wait()  # the step before is whole, and the best one before it not yet gone
    self._best_step = best_step
    with self._told():
      self._manager.save(step, force=True, args=ocp.args.Composite(
          params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest), description=ocp.args.JsonSave(description)))

  def wait(self) -> None:
    """Returns when all that was begun is on disk."""
    with self._told():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """A full disk, or another refusal of the operating system, becomes a UserError: Orbax's error of a write begun earlier."""
    try:
      yield
    except (OSError, ValueError) as error:
      code = error.errno if isinstance(error, OSError) else _OS_ERROR.search(str(error))
      if code is None:
        raise
      reason = os.strerror(code if isinstance(code, int) else int(code[1]))
      whole = newest_step(self._model_dir)
      goes_on = 'nothing was saved before' if whole is None else f'step {whole} is whole, and the run goes on from it'
      raise UserError(f'{self._model_dir}: a checkpoint cannot be written ({reason}); {goes_on}: make room or mend the place, '
                      'and run the same command again.') from error

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    with self._told():
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()


def _first_line(error: Exception) -> str:
  return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _earlier(model_dir: pathlib.Path, step: int) -> str:
  """What to do about a step that is damaged."""
  before = [other for other in whole_steps(model_dir) if other < step]
  return 'remove this step to ' + (f'use step {max(before)}' if before else 'begin anew: there is no earlier one')


def whole_steps(model_dir: str | os.PathLike) -> list[int]:
  """The steps of a run that were written to their end, in order. In a bucket such a one holds a file that says so."""
  folder = storage.place(model_dir) / FOLDER
  steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
  if not storage.is_bucket(model_dir):
    return steps
  return [step for step in steps if (folder / str(step) / storage.COMMIT_SUCCESS_FILE).exists()]


def newest_step(model_dir: str | os.PathLike) -> int | None:
  """The newest whole step of a run; None if there is none."""
  return max(whole_steps(model_dir), default=None)


def find(path: str | pathlib.Path) -> Found:
  """The checkpoint at `path`: a run's folder (its newest step), `best` after it, or the folder of one step.

  Raises UserError.
  """
  path = storage.place(path)
  if path.name == BEST and not path.exists() and newest_step(path.parent) is not None:
    step = (find(path.parent).description.get('best') or {}).get('step')
    if step is None:
      raise UserError(f'{path}: this run has no best step, for it was not judged by schedule.best_metric; give {path.parent}.')
    return find(path.parent / FOLDER / str(step))
  if path.name.isdigit() and path.parent.name == FOLDER:
    model_dir, step = path.parent.parent, int(path.name)
  else:
    model_dir = path
    step = newest_step(path)
    if step is None:
      copied = ''
      if storage.is_bucket(path):
        copied = f' (a step that was copied here from a folder has no {storage.COMMIT_SUCCESS_FILE})'
      raise UserError(f'{path}: holds no checkpoint{copied}; give the MODEL_DIR of a run that `calrec train` has saved a step '
                      'of, or the folder of one step.')
  description = model_dir / FOLDER / str(step) / 'description' / 'metadata'
  try:
    return Found(model_dir, step, json.loads(description.read_text()))
  except (OSError, ValueError) as error:
    raise UserError(f'{description}: the checkpoint is damaged ({_first_line(error)}); {_earlier(model_dir, step)}.') from error


@contextlib.contextmanager
def _reading(found: Found) -> Iterator[ocp.StandardCheckpointer]:
  """A reader of a checkpoint's items; what it raises for a damaged one becomes a UserError."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      yield checkpointer
  except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
    raise UserError(f'{found.folder}: the checkpoint cannot be read ({_first_line(error)}); '
                    f'{_earlier(found.model_dir, found.step)}.') from error


def load(found: Found, **items: Any) -> dict[str, Any]:
  """Items of a checkpoint (`params`, `rest`), each laid out as the given abstract tree (shape, dtype, sharding).

  Raises UserError for a damaged one.
  """
  with _reading(found) as checkpointer:
    return {name: checkpointer.restore(found.folder / name, target) for name, target in items.items()}


def check_fits(found: Found, *, decoder: DecoderConfig, vocabulary: str, template: dict[str, Any]) -> None:
  """Raises UserError where a checkpoint is of another model shape, vocabulary or text than asked for.

  Low-rank factors are no part of that: they are merged, or begun; nor is how v_U is made. An imported model fits any text.
  """
  where = found.folder
  ours, theirs = decoder.shape(), found.description['decoder']
  differ = [f'{k} is {theirs.get(k)} there, {ours[k]} here' for k in ours
            if theirs.get(k) != ours[k] and k != 'user_half_life' and not k.startswith('lora')]
  if differ:
    raise UserError(f'{where}: a checkpoint of another model shape ({"; ".join(differ)}); bind the gin/models file that it was '
                    'trained with.')
  if found.description['vocabulary'] != vocabulary:
    raise UserError(f'{where}: trained with another vocabulary ({found.description["vocabulary"][:12]} there, '
                    f'{vocabulary[:12]} here); set VOCABULARY to {found.vocabulary_path}.')
  if found.description['template'] not in (None, template):
    raise UserError(f'{where}: trained with other item texts ({found.description["template"]} there, {template} here); set '
                    'text.fields and text.unknown as there.')


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes of `tree` with shardings: the target of a restore."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def stored_dtype(found: Found) -> str:
  """The type of a checkpoint's weights: `bfloat16` if all are that, else `float32`. Raises UserError for a damaged one."""
  with _reading(found) as checkpointer:
    leaves = jax.tree.leaves(checkpointer.metadata(found.folder / 'params').item_metadata.tree)
  return 'bfloat16' if all(str(leaf.dtype) == 'bfloat16' for leaf in leaves) else 'float32'
