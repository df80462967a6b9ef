"""A partial file: finished batches of JSON lines on disk, so that a run that was stopped goes on where it was.

Several processes have a file each, and read those of all. A file is a sequence of gzip members. The first holds the settings
that it was begun with, each further one a batch. A member that was being written when the run was stopped is not whole, and is
dropped.
"""

import gzip
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

from calrec_jax.errors import UserError

_CHUNK_BYTES = 1 << 14


def partial_file(out: str | os.PathLike, process: int = 0) -> pathlib.Path:
  """Where a process keeps its batches while `out` is made."""
  return pathlib.Path(f'{out}.partial{f"-{process}" if process else ""}')


def partial_files(out: str | os.PathLike) -> list[pathlib.Path]:
  """The files that are there, of all processes that ever were at it."""
  out = pathlib.Path(out)
  ours = re.compile(re.escape(out.name) + r'\.partial(-\d+)?')
  return sorted(path for path in out.parent.glob('*.partial*') if ours.fullmatch(path.name))


def finished_rows(out: str | os.PathLike, settings: Mapping[str, object]) -> dict[str, dict]:
  """The rows of all finished batches, of all processes, by user id. UserError if a file was begun with other settings."""
  batches = [batch for path in partial_files(out) for batch in _read(path, json.loads(json.dumps(settings)))[0]]
  return {row['user_id']: row for batch in batches for row in batch}


class Partial:
  """The batches that are finished, and the file that further ones are appended to. A context manager."""

  def __init__(self, path: str | os.PathLike, settings: Mapping[str, object]):
    """Opens the file at `path`, or begins it.

    Args:
      path: where it is, or will be.
      settings: what the lines depend on, JSON values by name.

    Raises:
      UserError: the file was begun with other settings (they are named), or cannot be written.
    """
    self.path = pathlib.Path(path)
    self.batches: list[list[dict]] = []  # rows of each finished batch, in the order of writing
    settings = json.loads(json.dumps(settings))
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(self.path, 'ab')
      try:
        self.batches, end = _read(self.path, settings)
        self._file.truncate(end)
        if not end:
          self._append([settings])
      except BaseException:
        self._file.close()
        raise
    except OSError as error:
      raise UserError(f'{self.path}: cannot be written ({error.strerror}); choose another place.') from error

  def append(self, rows: Sequence[Mapping]) -> None:
    """Adds a finished batch. Raises UserError if the file cannot be written, as on a full disk."""
    try:
      self._append(rows)
    except OSError as error:
      raise UserError(f'{self.path}: cannot be written ({error.strerror}); what is finished is kept: make room, and '
                      'run the same command again.') from error
    self.batches.append(list(rows))

  def __enter__(self) -> 'Partial':
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def _append(self, rows: Sequence[Mapping]) -> None:
    lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    self._file.write(gzip.compress(lines.encode(), mtime=0))
    self._file.flush()


def _read(path: pathlib.Path, settings: dict) -> tuple[list[list[dict]], int]:
  """The finished batches, and where the last whole member ends: 0 if there is none."""
  batches, end = [], 0
  for rows, member_end in _members(path):
    if end:
      batches.append(rows)
    elif rows != [settings]:
      raise UserError(f'{path}: was begun with other settings ({_differences(rows, settings)}); take those to '
                      'finish it, remove it to begin anew, or choose another place.')
    end = member_end
  return batches, end


def _members(path: pathlib.Path) -> Iterator[tuple[list[dict], int]]:
  """(rows, end in the file) of each gzip member, up to the first that is not whole."""
  with open(path, 'rb') as file:
    end = 0
    while True:
      file.seek(end)
      reader, content = zlib.decompressobj(wbits=31), []
      while not reader.eof:
        chunk = file.read(_CHUNK_BYTES)
        try:
          content.append(reader.decompress(chunk))
        except zlib.error:
          return
        if not chunk:
          return
      end = file.tell() - len(reader.unused_data)
      yield [json.loads(line) for line in b''.join(content).split(b'\n') if line], end


def _differences(rows: list, settings: dict) -> str:
  """Which settings differ, and how."""
  there = rows[0] if rows and isinstance(rows[0], dict) else {}
  names = [name for name in {**settings, **there} if there.get(name) != settings.get(name)]
  return ', '.join(f'{name}: {there.get(name)!r} there, {settings.get(name)!r} now' for name in names)
