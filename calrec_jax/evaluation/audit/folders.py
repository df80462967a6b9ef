"""The folders that are audited: told apart by what lies in them, with what their records name."""

import ast
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from calrec_jax import outputs, provenance
from calrec_jax.errors import UserError
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.ranking.candidates import candidate_files
from calrec_jax.training import checkpoints

HISTORIES, TRAINING, INFERENCE, EVALUATION, INDEX = 'histories', 'training run', 'inference', 'evaluation', 'index'
_SPLITS = ('test', 'validation')


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder of this project.

  Attributes:
    path: where it lies.
    kind: one of the five above.
    record: its run.json; {} where there is none.
    data: the fingerprint of each data set that it was made from, by name; of an evaluation, as in its metrics.json.
    split: of an inference or an evaluation: `test` or `validation`; None where nothing tells.
    protocol: of an evaluation: the rules, as in its metrics.json.
    links: folders that its records name, by what they are: `initial_checkpoint` and `data_dir` of a training run, `checkpoint`
      of an inference, `generations` of an evaluation. Those that do not exist are left out.
    lost: links that the records name, and that do not exist.
  """

  path: pathlib.Path
  kind: str
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  data: Mapping[str, str] = dataclasses.field(default_factory=dict)
  split: str | None = None
  protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  links: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
  lost: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_folder(path: str | os.PathLike) -> Folder:
  """Reads a folder's records. `MODEL_DIR/best` and the folder of one step stand for their MODEL_DIR.

  Raises UserError where it is no folder of this project, or a record is broken.
  """
  path = _model_dir(pathlib.Path(path))
  kind = kind_of(path)
  if kind is None:
    what = 'not a folder of this project' if path.is_dir() else 'no such folder'
    raise UserError(f'{path}: {what}; give a histories folder, a training run, an index, or what `calrec infer` or '
                    '`calrec evaluate` wrote.')
  if kind in (HISTORIES, INDEX):
    return Folder(path, kind)
  record = outputs.read_object(path / 'run.json') if (path / 'run.json').exists() else {}
  data, split, protocol = record.get('data'), None, {}
  if kind == TRAINING:
    data = checkpoints.find(path).description['data'] if data is None else data  # None: an imported model
    named = _gin_values(path / 'config.gin', ('train.initial_checkpoint', 'inputs.data_dir'))
  elif kind == INFERENCE:
    report = record.get('report')
    split = report.get('split') if isinstance(report, dict) else None
    named = {'checkpoint': record.get('checkpoint')}
  else:
    measured = outputs.read_object(path / 'metrics.json')
    protocol, told = measured.get('protocol'), measured.get('data')
    if not isinstance(protocol, dict) or protocol.get('split') not in _SPLITS or not _is_texts(told, ('name', 'fingerprint')):
      raise UserError(f'{path / "metrics.json"}: names no protocol with a split, or no data set; make it anew with '
                      '`calrec evaluate`.')
    data, split = {told['name']: told['fingerprint']}, protocol['split']
    named = {'generations': record.get('generations')}
  data = {} if data is None else data
  if not _is_texts(data, ()) or split not in (None, *_SPLITS):
    raise UserError(f'{path / "run.json"}: "data" or "split" is not as this project writes it; restore the file.')
  links, lost = _resolved(path, named)
  return Folder(path, kind, record, data, split, protocol, links, lost)


def open_all(paths: Iterable[str | os.PathLike]) -> list[Folder]:
  """The folders, and those that their records lead to: an evaluation's generations, their checkpoint, its stage I.

  Each once, in the order in which they are met. Raises UserError as `open_folder` does for the folders given; a folder that
  a record leads to and that is not what it was is passed over.
  """
  found: dict[pathlib.Path, Folder] = {}
  waiting = [(pathlib.Path(path), True) for path in paths]
  while waiting:
    path, is_given = waiting.pop(0)
    if not is_given and kind_of(path) not in (TRAINING, INFERENCE):
      continue
    folder = open_folder(path)
    if folder.path.resolve() not in found:
      found[folder.path.resolve()] = folder
      waiting += [(_model_dir(link), False) for name, link in folder.links.items() if name != 'data_dir']
  return list(found.values())


def kind_of(path: pathlib.Path) -> str | None:
  """What a folder is; None if it is no folder of this project."""
  if not path.is_dir():
    return None
  if (path / 'metrics.json').is_file() and any(path.glob('rankings-*.jsonl.gz')):
    return EVALUATION
  if (path / GENERATIONS).is_file() or candidate_files(path):
    return INFERENCE
  if (path / 'index.json').is_file():
    return INDEX
  if any((path / f'sequences.{suffix}').is_file() for suffix in ('jsonl.gz', 'jsonl', 'parquet')):
    return HISTORIES
  return TRAINING if checkpoints.newest_step(path) is not None else None


def _model_dir(path: pathlib.Path) -> pathlib.Path:
  """The run's folder of what may stand for a checkpoint, or the folder of a file of generations."""
  if path.name == checkpoints.BEST and not path.exists():
    return path.parent
  if path.name.isdigit() and path.parent.name == checkpoints.FOLDER:
    return path.parent.parent
  return path.parent if path.is_file() and path.name == GENERATIONS else path


def _is_texts(value: object, keys: tuple[str, ...]) -> bool:
  """Whether it is an object of texts that has these keys."""
  return isinstance(value, dict) and set(keys) <= value.keys() and all(isinstance(each, str) for each in value.values())


def _gin_values(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, object]:
  """Literal values of bindings in the text that gin wrote, macros looked up; what cannot be read is left out."""
  try:
    text = re.sub(r'\\\n\s*', '', path.read_text(encoding='utf-8'))  # gin breaks long lines
  except (OSError, UnicodeDecodeError):
    return {}
  bound = dict(re.findall(r'^([A-Za-z_][\w./]*) = (.*)$', text, re.M))
  found = {}
  for name in names:
    value, seen = bound.get(name), set()
    while value is not None and value.startswith('%') and value not in seen:
      seen.add(value)
      value = bound.get(value[1:])
    try:
      found[name.split('.')[-1]] = ast.literal_eval(value or '')
    except (ValueError, SyntaxError):
      continue
  return found


def _resolved(folder: pathlib.Path, named: Mapping[str, object]) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
  """(links that exist, links that do not)."""
  links, lost = {}, {}
  for name, value in named.items():
    if not isinstance(value, str) or not value:
      continue
    there = next((place for place in provenance.places(folder, value) if _model_dir(place).exists()), None)
    if there is None:
      lost[name] = value
    else:
      links[name] = there
  return links, lost
