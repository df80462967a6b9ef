"""Checkpoints: one atomic folder a step, with weights, optimizer, step, RNG, and what they belong to.

`MODEL_DIR/checkpoints/<step>/` holds three items: `params`, `rest` (step, RNG key, optimizer state) and `description`
(decoder shape, vocabulary, texts, lengths, data, gin text, versions). A half-written step has another name and is not seen.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from calrec_jax.errors import UserError
from calrec_jax.models.decoder import DecoderConfig

FOLDER = 'checkpoints'
VOCABULARY_FILE = 'vocabulary.json'


@dataclasses.dataclass(frozen=True)
class Found:
  """A whole checkpoint on disk: the run's folder, the step, and its description."""

  model_dir: pathlib.Path
  step: int
  description: dict[str, Any]

  @property
  def vocabulary_path(self) -> pathlib.Path:
    return self.model_dir / VOCABULARY_FILE

  def decoder_config(self, **changes: Any) -> DecoderConfig:
    """The shape that was trained; `changes` set what is not part of the shape (dtype, remat, dropout)."""
    return DecoderConfig(**{**self.description['decoder'], **changes})


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, model_dir: str | pathlib.Path, *, keep: int = 3):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(pathlib.Path(model_dir).absolute() / FOLDER, options=options,
                                          item_names=('params', 'rest', 'description'))

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, params: Any, rest: Any, description: dict[str, Any]) -> None:
    """Begins to write a step; returns before it is on disk. Call `wait` before the process ends."""
    self._manager.save(step, force=True, args=ocp.args.Composite(
        params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest), description=ocp.args.JsonSave(description)))

  def restore(self, step: int, params: Any, rest: Any) -> tuple[Any, Any]:
    """(params, rest) of a step, laid out as the given abstract arrays (shape, dtype, sharding)."""
    restored = _restore(self._manager, step, params=params, rest=rest)
    return restored['params'], restored['rest']

  def wait(self) -> None:
    """Returns when all that was begun is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
  try:
    return manager.restore(step, args=ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in items.items()}))
  except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
    where = pathlib.Path(manager.directory) / str(step)
    raise UserError(f'{where}: the checkpoint cannot be read ({_first_line(error)}); remove this step to use an earlier one.') from error


def _first_line(error: Exception) -> str:
  return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def find(path: str | pathlib.Path) -> Found:
  """The checkpoint at `path`: a run's folder (its newest step) or the folder of one step. Raises UserError."""
  path = pathlib.Path(path).absolute()
  if path.name.isdigit() and path.parent.name == FOLDER:
    model_dir, step = path.parent.parent, int(path.name)
  else:
    model_dir = path
    folder = path / FOLDER
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    if not steps:
      raise UserError(f'{path}: holds no checkpoint; give the MODEL_DIR of a run that `calrec train` has saved a step of, or '
                      'the folder of one step.')
    step = max(steps)
  description = model_dir / FOLDER / str(step) / 'description' / 'metadata'
  try:
    return Found(model_dir, step, json.loads(description.read_text()))
  except (OSError, ValueError) as error:
    raise UserError(f'{description}: the checkpoint is damaged ({_first_line(error)}); remove this step to use an earlier '
                    'one.') from error


def load_params(found: Found, abstract_params: Any) -> Any:
  """The weights of a checkpoint, laid out as `abstract_params` (shape, dtype, sharding)."""
  with ocp.CheckpointManager(found.model_dir / FOLDER, item_names=('params', 'rest', 'description'),
                             options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    return _restore(manager, found.step, params=abstract_params)['params']


def check_fits(found: Found, *, decoder: DecoderConfig, vocabulary: str, template: dict[str, Any]) -> None:
  """Raises UserError where a checkpoint is of another model shape, vocabulary or text than asked for."""
  where = found.model_dir / FOLDER / str(found.step)
  ours, theirs = decoder.shape(), found.description['decoder']
  differ = [f'{k} is {theirs.get(k)} there, {ours[k]} here' for k in ours if theirs.get(k) != ours[k]]
  if differ:
    raise UserError(f'{where}: a checkpoint of another model shape ({"; ".join(differ)}); bind the gin/models file that it was '
                    'trained with.')
  if found.description['vocabulary'] != vocabulary:
    raise UserError(f'{where}: trained with another vocabulary ({found.description["vocabulary"][:12]} there, {vocabulary[:12]} '
                    f'here); set VOCABULARY to {found.vocabulary_path}.')
  if found.description['template'] != template:
    raise UserError(f'{where}: trained with other item texts ({found.description["template"]} there, {template} here); set '
                    'text.fields and text.unknown as there.')


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes of `tree` with shardings: the target of a restore."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
