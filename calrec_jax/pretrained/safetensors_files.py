"""Safetensors: a Hugging Face folder read by rows of tensors, and written by shards.

The library maps a file into memory as a whole, which then counts as the process's; here the rows that are asked for are read.
"""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from calrec_jax.errors import UserError
from calrec_jax.pretrained import families

INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'
_DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(jnp.bfloat16)}
_BEFORE = ('language_model.model.', 'model.language_model.')  # the names of text in models that see pictures too
_OTHER_KINDS = ('vision_tower.', 'multi_modal_projector.', 'model.vision_tower.', 'model.multi_modal_projector.')
_BUFFERS = ('rotary_emb.inv_freq',)  # old files hold what follows from the configuration


class _Place(NamedTuple):
  """Where a tensor lies."""

  file: pathlib.Path
  offset: int  # bytes
  dtype: np.dtype
  shape: tuple[int, ...]


class SafetensorsSource:
  """A Hugging Face folder as a `TensorSource`.

  Raises:
    UserError: what is needed is not in the folder, a file is truncated or no safetensors file, an unknown architecture, a
      pickle, numbers of a type that is not known.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    hf = read_json(self.folder / 'config.json', 'a Hugging Face folder holds one')
    self.config = families.to_config(hf, str(self.folder / 'config.json'))
    family, keys = families.family_of(hf, str(self.folder / 'config.json'))
    self.architecture = family.model_type
    self.about = {'name': hf.get('_name_or_path') or _name(self.folder), 'license': _license(self.folder),
                  'max_position_embeddings': keys['max_position_embeddings'], 'source': self.folder.resolve().name}
    self._places = {name: place for file in _files(self.folder) for name, place in _places(file).items()}
    self.dtype = 'bfloat16' if {place.dtype for place in self._places.values()} == {_DTYPES['BF16']} else 'float32'

  def names(self) -> set[str]:
    return set(self._places)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._places[name].shape

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of a tensor, bfloat16 where the file has that, else float32."""
    place = self._places[name]
    start, stop, _ = slice(start, stop).indices(place.shape[0])
    row = int(np.prod(place.shape[1:])) * place.dtype.itemsize
    with open(place.file, 'rb') as file:
      file.seek(place.offset + start * row)
      rows = np.frombuffer(file.read((stop - start) * row), place.dtype)
    rows = rows.astype(np.float32) if place.dtype == np.float16 else rows
    return rows.reshape(stop - start, *place.shape[1:])


def read_json(path: pathlib.Path, why: str) -> dict[str, Any]:
  """A JSON file's object. Raises UserError, with `why` it is needed, if there is none."""
  try:
    parsed = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); {why}.') from error
  except ValueError as error:
    raise UserError(f'{path}: not JSON ({error}); download it again.') from error
  if not isinstance(parsed, dict):
    raise UserError(f'{path}: holds a {type(parsed).__name__}, not an object; download it again.')
  return parsed


def write_shards(folder: pathlib.Path, tensors: Sequence[tuple[str, tuple[int, ...]]], read: Callable[[str], np.ndarray],
                 dtype: str, *, max_shard_bytes: int) -> int:
  """Writes tensors as `model.safetensors`, or as numbered shards with their index.

  Args:
    folder: is there, and empty of them.
    tensors: (name, shape) of each, in the order of the files.
    read: name -> the tensor, in `dtype`; called once for each, so that one shard only is in memory.
    dtype: `float32` or `bfloat16`.
    max_shard_bytes: a shard is closed before it grows past this; one tensor always fits.

  Returns:
    The number of files.
  """
  item = 2 if dtype == 'bfloat16' else 4
  sizes = {name: int(np.prod(shape)) * item for name, shape in tensors}
  shards: list[list[str]] = [[]]
  for name, size in sizes.items():
    if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
      shards.append([])
    shards[-1].append(name)
  n = len(shards)
  files = [_SINGLE] if n == 1 else [f'model-{i:05}-of-{n:05}.safetensors' for i in range(1, n + 1)]
  for file, names in zip(files, shards, strict=True):
    _write(folder / file, names, dict(tensors), sizes, read, dtype)
  if n > 1:
    weights = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    (folder / INDEX).write_text(json.dumps({'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weights}, indent=2))
  return n


def _write(path: pathlib.Path, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int],
           read: Callable[[str], np.ndarray], dtype: str) -> None:
  """One file, tensor by tensor: its length in 8 bytes, a JSON header, the numbers (the format's own description)."""
  ends = np.cumsum([sizes[name] for name in names]).tolist()
  header = {'__metadata__': {'format': 'pt'}} | {
      name: {'dtype': {'bfloat16': 'BF16', 'float32': 'F32'}[dtype], 'shape': list(shapes[name]),
             'data_offsets': [end - sizes[name], end]} for name, end in zip(names, ends, strict=True)}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # the numbers are aligned
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      file.write(np.ascontiguousarray(read(name)).view(np.uint8).data)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The weight files of a folder, all of which are there."""
  if (folder / INDEX).exists():
    weights = read_json(folder / INDEX, 'it names the shards').get('weight_map')
    if not isinstance(weights, dict) or not weights or not all(
        isinstance(name, str) and pathlib.Path(name).name == name for name in weights.values()):
      raise UserError(f'{folder / INDEX}: names no shards (weight_map); download it again.')
    files = [folder / name for name in sorted(set(weights.values()))]
    if missing := [file.name for file in files if not file.exists()]:
      raise UserError(f'{folder}: {", ".join(missing)}: missing, of {len(files)} shards that {INDEX} names; download it.')
    return files
  if (folder / _SINGLE).exists():
    return [folder / _SINGLE]
  if pickles := sorted(path.name for suffix in ('bin', 'pt', 'pth') for path in folder.glob(f'*.{suffix}')):
    raise UserError(f'{folder / pickles[0]}: a pickle, which can run code when it is read, and is refused; take the model\'s '
                    '*.safetensors files, or convert it where you trust it: transformers\' model.save_pretrained(DIR).')
  raise UserError(f'{folder}: holds no {_SINGLE} and no {INDEX}; give the folder of a downloaded model, or a .gguf file.')


def _places(file: pathlib.Path) -> dict[str, _Place]:
  """Name, as the decoder's tensors are called, to the place of every tensor of a file."""
  try:
    with safetensors.safe_open(file, framework='numpy'):
      pass  # the library's own checks: the header is whole, and the numbers fill the file
    with open(file, 'rb') as opened:
      length = int.from_bytes(opened.read(8), 'little')
      header = json.loads(opened.read(length))
  except (OSError, safetensors.SafetensorError, ValueError) as error:
    raise UserError(f'{file}: not a whole safetensors file ({" ".join(str(error).split())}); download it again.') from error
  header.pop('__metadata__', None)
  if others := [there for there in header if there.startswith(_OTHER_KINDS)]:
    logging.warning('%s: %d tensors for pictures are left out: only the text part is imported.', file, len(others))
  places = {}
  for there, entry in header.items():
    if there.startswith(_OTHER_KINDS) or there.endswith(_BUFFERS):
      continue
    if entry['dtype'] not in _DTYPES:
      raise UserError(f'{file}: {there} is of the type {entry["dtype"]}; known are {", ".join(_DTYPES)}.')
    prefix = next((prefix for prefix in _BEFORE if there.startswith(prefix)), None)
    name = f'model.{there.removeprefix(prefix)}' if prefix else there.removeprefix('language_model.')
    places[name] = _Place(file, 8 + length + entry['data_offsets'][0], _DTYPES[entry['dtype']], tuple(entry['shape']))
  return places


def _name(folder: pathlib.Path) -> str:
  """The folder's name; in the cache of the Hugging Face hub, where that is a hash, the model's."""
  parts = folder.resolve().parts
  if len(parts) > 2 and parts[-2] == 'snapshots' and parts[-3].startswith('models--'):
    return parts[-3].removeprefix('models--').replace('--', '/')
  return parts[-1]


def _license(folder: pathlib.Path) -> str | None:
  """What the model card's front matter states, if there is a card."""
  try:
    lines = (folder / 'README.md').read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError):
    return None
  front = lines[1:lines.index('---', 1)] if lines[:1] == ['---'] and '---' in lines[1:] else []
  stated = [line.removeprefix('license:').strip().strip('\'"') for line in front if line.startswith('license:')]
  return stated[0] if stated else None
