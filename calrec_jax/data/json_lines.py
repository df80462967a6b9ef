"""Files of JSON lines: read, gzipped or plain, so that bad input is named by file and line; written in equal bytes."""

import codecs
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import BinaryIO

import tqdm
from isal import igzip, isal_zlib

from calrec_jax.errors import UserError

MAX_LINE_BYTES = 1 << 26  # so that no file, however it was packed, takes the memory that it likes
_CHUNK_BYTES = 1 << 20
_PACKED_BYTES = 1 << 21  # at a time
_GZIP = zlib.MAX_WBITS + 16  # as zlib is told to write gzip's header, without a name and a time
_LEVEL = 4  # of gzip: lists of ids take 7 % more room than with 6, in half the time


@dataclasses.dataclass(frozen=True)
class Source:
  """A file that was read to its end once.

  Attributes:
    path: where it lies.
    sha256: hex digest of its bytes as stored.
    lines: lines that hold more than white space.
    gzipped: told by its content, not by its name.
  """

  path: pathlib.Path
  sha256: str
  lines: int
  gzipped: bool

  def description(self) -> dict:
    """What `dataset.json` keeps of it: no folder names."""
    return {'file': self.path.name, 'sha256': self.sha256, 'lines': self.lines}


class BadLines:
  """Counts the bad lines of one file, and raises UserError when there is one more than tolerated.

  `tolerated` is None where the user has no such choice: the first bad line is an error. `first` says what is wrong with the
  first three.
  """

  def __init__(self, path: str | os.PathLike, tolerated: int | None):
    self.path = pathlib.Path(path)
    self.tolerated = tolerated
    self.count = 0
    self.first: list[str] = []

  def add(self, number: int, what: str) -> None:
    """Counts line `number` (from 1), which is bad because of `what`."""
    self.count += 1
    if len(self.first) < 3:
      self.first.append(f'line {number}: {what}')
    if self.count > (self.tolerated or 0):
      more = f' ({self.count} bad lines up to here, {self.tolerated} tolerated)' if self.tolerated else ''
      cure = 'repair it' if self.tolerated is None else 'repair it, or tolerate it with --max_bad_lines'
      raise UserError(f'{self.path}: line {number}: {what}{more}; {cure}.')

  def tell(self) -> None:
    """Logs how many there are, and the first ones, if there are any."""
    if self.count:
      logging.info('%s: %d bad lines are passed over; the first: %s.', self.path, self.count, '; '.join(self.first))


def file_at(path: str | os.PathLike) -> pathlib.Path:
  """Returns `path`; raises UserError unless a file lies there."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f'{path}: {"is a folder, not a file" if path.is_dir() else "no such file"}; check the path.')
  return path


def is_gzipped(path: pathlib.Path) -> bool:
  """Whether a file is gzip, by its content. Raises UserError if it is not, but is named so, or if it cannot be read."""
  try:
    with path.open('rb') as file:
      magic = file.read(2)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}).') from error
  if magic != b'\x1f\x8b' and path.suffix == '.gz':
    raise UserError(f'{path}: is not gzip, although its name ends in .gz; download it again, or take .gz off its name.')
  return magic == b'\x1f\x8b'


def digest(path: str | os.PathLike, *, progress: bool = True) -> str:
  """The sha256 of a file's bytes as stored, in hex. Raises UserError if there is no such file, or it cannot be read."""
  path = file_at(path)
  found = hashlib.sha256()
  try:
    with path.open('rb') as file, tqdm.tqdm(total=path.stat().st_size, unit='B', unit_scale=True, delay=1, leave=False,
                                            desc=f'checking {path.name}', disable=not progress) as bar:
      while chunk := file.read(_CHUNK_BYTES):
        found.update(chunk)
        bar.update(len(chunk))
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}).') from error
  return found.hexdigest()


def inspect(path: str | os.PathLike, *, progress: bool = True) -> Source:
  """Reads a file to its end: its digest, its number of lines, whether it is whole.

  Raises:
    UserError: the file is missing or unreadable, a .gz that is not gzip, a truncated or damaged one, or as `lines` says.
  """
  path, sha256 = file_at(path), hashlib.sha256()
  n_lines = sum(n_filled for _, n_filled in blocks(path, sha256=sha256, progress=progress))
  return Source(path, sha256.hexdigest(), n_lines, is_gzipped(path))


def blocks(path: str | os.PathLike, *, sha256: object = None, progress: bool = True) -> Iterator[tuple[bytes, int]]:
  """Yields a file, unpacked, in blocks of whole lines: (text, how many of its lines hold more than white space).

  A byte order mark of UTF-8 is left out.

  Args:
    path: of the file.
    sha256: takes the bytes as stored, if given.
    progress: whether to show progress on stderr.

  Raises:
    UserError: as `inspect`, for UTF-16, and for a line of more than `MAX_LINE_BYTES`, of which little more is read.
  """
  path = file_at(path)
  gzipped = is_gzipped(path)
  number, rest = 0, b''  # lines before, and the beginning of the next
  try:
    with path.open('rb') as raw, tqdm.tqdm(total=path.stat().st_size, unit='B', unit_scale=True, delay=1, leave=False,
                                           desc=f'reading {path.name}', disable=not progress) as bar:
      stored = _Stored(raw, sha256, bar)
      file = igzip.IGzipFile(fileobj=stored, mode='rb') if gzipped else stored
      while chunk := file.read(_CHUNK_BYTES):
        end = chunk.rfind(b'\n') + 1
        block = rest + chunk[:end] if end else b''
        if (block.index(b'\n') if end else len(rest) + len(chunk)) > MAX_LINE_BYTES:
          raise UserError(f'{path}: line {number + 1}: longer than {MAX_LINE_BYTES >> 20} MiB; repair the file, or give '
                          'another.')
        rest = chunk[end:] if end else rest + chunk
        if end:
          block = block if number else _without_mark(path, block)
          found = io.BytesIO(block).readlines()
          yield block, len(found) - sum(map(bytes.isspace, found))
          number += len(found)
    if rest:
      rest = rest if number else _without_mark(path, rest)
      yield rest, int(rest != b'' and not rest.isspace())
  except (EOFError, zlib.error, isal_zlib.error, gzip.BadGzipFile) as error:
    raise UserError(f'{path}: is truncated or damaged ({error}); download or copy it again.') from error
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}).') from error


class _Stored(io.RawIOBase):
  """A file's bytes as stored; those that are read count in a digest, if there is one, and in a bar."""

  def __init__(self, file: BinaryIO, sha256: object, bar: tqdm.tqdm):
    self._file, self._sha256, self._bar = file, sha256, bar

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:
    count = self._file.readinto(buffer)
    if self._sha256 is not None:
      self._sha256.update(memoryview(buffer)[:count])
    self._bar.update(count)
    return count


def lines(path: str | os.PathLike, *, progress: bool = True) -> Iterator[tuple[int, bytes]]:
  """Yields (number from 1, line) of each line that holds more than white space; only \\n ends a line.

  Raises UserError as `blocks` does.
  """
  every = itertools.chain.from_iterable(io.BytesIO(block) for block, _ in blocks(path, progress=progress))
  for number, line in enumerate(every, start=1):
    if not line.isspace():
      yield number, line


def _without_mark(path: pathlib.Path, block: bytes) -> bytes:
  if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise UserError(f'{path}: is text in UTF-16; save it as UTF-8.')
  return block.removeprefix(codecs.BOM_UTF8)


def objects(path: str | os.PathLike, bad: BadLines, *, read: Callable[[bytes], object] = json.loads, progress: bool = True
            ) -> Iterator[tuple[int, dict]]:
  """Yields (number from 1, object) of each line; lines that hold no JSON object go to `bad`.

  `read` gives the value of a line, or raises ValueError or RecursionError. Raises UserError as `lines` and `bad` do.
  """
  for number, line in lines(path, progress=progress):
    try:
      row = read(line)
    except (ValueError, RecursionError) as error:
      bad.add(number, f'not JSON ({str(error).splitlines()[0]})')
      continue
    if isinstance(row, dict):
      yield number, row
    else:
      bad.add(number, f'a JSON {type(row).__name__}, where an object is expected')


def write(path: pathlib.Path, rows: Iterable[Mapping], *, ensure_ascii: bool = False) -> None:
  """Writes gzipped JSON lines, without name and time in the file: equal rows give equal bytes."""
  write_texts(path, map(json.JSONEncoder(ensure_ascii=ensure_ascii).encode, rows))


def write_texts(path: pathlib.Path, texts: Iterable[str]) -> None:
  """Writes gzipped lines of texts that are JSON already; see `write`."""
  packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
  with path.open('wb') as file, futures.ThreadPoolExecutor(1) as pool:
    packed = pool.submit(bytes)
    for block in _joined(texts):  # made while the one before is packed
      file.write(packed.result())
      packed = pool.submit(packer.compress, block)
    file.write(packed.result() + packer.flush())


def _joined(texts: Iterable[str]) -> Iterator[bytearray]:
  """Lines of texts in blocks of about `_PACKED_BYTES`."""
  block = bytearray()
  for text in texts:
    block += text.encode()
    block += b'\n'
    if len(block) >= _PACKED_BYTES:
      yield block
      block = bytearray()
  yield block
