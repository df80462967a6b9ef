"""GGUF files: their metadata, and rows of their tensors as float32.

PyPI's `gguf` parses the file and dequantises; it would map the file into memory as a whole, so rows are read here.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from calrec_jax.errors import UserError

TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1')  # what is read; `gguf` knows more, untested here


class Info(NamedTuple):
  """Where a tensor lies: its shape, rows first; the name of its type; its place in the file, bytes."""

  shape: tuple[int, ...]
  type: str
  offset: int
  size: int


class GgufFile:
  """A GGUF file.

  Attributes:
    path: the file.
    metadata: key to a number, text, truth value, or list of them.
    tensors: name to `Info`.

  Raises:
    UserError: no GGUF file, a truncated one, a tensor of a type that is not read, or `gguf` is not installed.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    try:
      import gguf
    except ImportError as error:
      raise UserError(f'{path}: reading a GGUF file needs the package gguf; pip install "calrec_jax[gguf]".') from error
    self._gguf = gguf
    try:
      size = self.path.stat().st_size
      with open(self.path, 'rb') as file:
        if file.read(4) != b'GGUF':
          raise UserError(f'{path}: not a GGUF file; give a .gguf file, or a Hugging Face folder.')
      reader = gguf.GGUFReader(self.path)
    except OSError as error:
      raise UserError(f'{path}: cannot be read ({error.strerror}); give a .gguf file, or a Hugging Face folder.') from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, UnicodeDecodeError) as error:
      why = ' '.join(str(error).split())[:120]
      raise UserError(f'{path}: the GGUF file is truncated or damaged ({why}); download it again.') from error
    self.metadata = {key: _plain(field, gguf) for key, field in reader.fields.items()}
    self.tensors = {t.name: Info(tuple(reversed(t.shape.tolist())), t.tensor_type.name, int(t.data_offset), int(t.n_bytes))
                    for t in reader.tensors}
    if short := [name for name, info in self.tensors.items() if info.offset + info.size > size]:
      raise UserError(f'{path}: the file is truncated ({size:,} bytes; {short[0]} lies behind its end); download it again.')
    if other := sorted({info.type for info in self.tensors.values()} - set(TYPES)):
      name = next(name for name, info in self.tensors.items() if info.type == other[0])
      raise UserError(f'{path}: {name} is quantised as {other[0]}; read are {", ".join(TYPES)}: take the file of one of these.')

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of a tensor's first axis, dequantised: float32."""
    info = self.tensors[name]
    start, stop, _ = slice(start, stop).indices(info.shape[0])
    row = info.size // info.shape[0]
    with open(self.path, 'rb') as file:
      file.seek(info.offset + start * row)
      raw = np.frombuffer(file.read((stop - start) * row), np.uint8).reshape(stop - start, row)
    kind = self._gguf.GGMLQuantizationType[info.type]
    plain = {'F32': np.float32, 'F16': np.float16}.get(info.type)
    values = raw.view(plain).astype(np.float32) if plain else self._gguf.quants.dequantize(raw, kind)
    return values.reshape(stop - start, *info.shape[1:])


def _plain(field: Any, gguf: Any) -> Any:
  """A field's value; of a float32 the shortest decimal, 1e-05 and not 9.999999747378752e-06."""
  value = field.contents()
  return float(str(np.float32(value))) if field.types[0] == gguf.GGUFValueType.FLOAT32 else value
