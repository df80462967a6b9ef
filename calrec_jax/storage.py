"""Buckets: a path such as gs://my-bucket/data is read through a copy on this machine, and written by way of one.

fsspec reaches them; gs:// needs the extra `gcs`. Checkpoints do not pass through here: Orbax reads and writes them in place,
each process its part. Copies lie in $CALREC_CACHE, else in ~/.cache/calrec_jax, and are fetched again when the bucket's files
are others.
"""

import contextlib
import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Collection, Iterator
from typing import Any

from calrec_jax.errors import UserError

PUSH_SECONDS = 30.
COMMIT_SUCCESS_FILE = 'commit_success.txt'  # Orbax's: in a bucket, what holds it is whole


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether a path has a scheme, such as gs://."""
  return '://' in os.fspath(path)


def place(path: str | os.PathLike) -> Any:
  """A `pathlib.Path`, absolute; of a bucket the `epath.Path` that Orbax takes, with the same methods. UserError: not gs://."""
  if not is_bucket(path):
    return pathlib.Path(path).absolute()
  text = os.fspath(path)
  if not text.startswith('gs://'):
    raise UserError(f'{text}: training runs and checkpoints lie in folders or in gs:// buckets; choose such a place.')
  _file_system(text)  # says what is missing
  from etils import epath
  return epath.Path(text)


def join(folder: str | os.PathLike, *names: str) -> str:
  """The path of something in a folder, be it in a bucket or not."""
  text = os.fspath(folder)
  return '/'.join([text.rstrip('/'), *names]) if is_bucket(text) else os.path.join(text, *names)


def is_dir(path: str | os.PathLike) -> bool:
  """Whether there is a folder; in a bucket: something whose name begins with `path`/."""
  if not is_bucket(path):
    return os.path.isdir(path)
  with _told(path, 'read'):
    return _fresh(path).isdir(os.fspath(path))


def exists(path: str | os.PathLike) -> bool:
  """Whether there is a file or folder."""
  if not is_bucket(path):
    return os.path.exists(path)
  with _told(path, 'read'):
    return _fresh(path).exists(os.fspath(path))


def names(folder: str | os.PathLike) -> list[str]:
  """The names in a folder, sorted; none where there is no folder."""
  if not is_bucket(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
  with _told(folder, 'read'), contextlib.suppress(FileNotFoundError):
    found = _fresh(folder).ls(os.fspath(folder), detail=False)
    return sorted({name.rstrip('/').rpartition('/')[2] for name in found})
  return []


def local(path: str | os.PathLike, files: Collection[str] | None = None) -> pathlib.Path:
  """Where a file or folder is on this machine: itself, or a copy of the bucket's.

  Args:
    path: what is to be read.
    files: of a bucket's folder only the files of these names; with a bucket's file these too, which lie beside it.

  Raises:
    UserError: the bucket has nothing of that name, or cannot be read.
  """
  if not is_bucket(path):
    return pathlib.Path(path)
  text = os.fspath(path).rstrip('/')
  with _told(text, 'read'):
    system = _fresh(text)
    found = _listed(system, text)
    if not found:
      raise UserError(f'{text}: no such file or folder; check the name.')
    if files is None:
      _forget(text, found)
      _fetch(system, text, found)
    else:
      folder, _, name = text.rpartition('/') if '' in found else (text, '', '')
      beside = _listed(system, folder, depth=1)
      _fetch(system, folder, {file: about for file, about in beside.items() if file in {*files, name}})
  return _kept(text, 'copies')


def upload(source: pathlib.Path, path: str | os.PathLike) -> None:
  """Copies a file, or what is in a folder, to a place in a bucket. Raises UserError.

  One after the other, by name (a data set is none without its sequences); last of all what says that a checkpoint is whole.
  """
  text = os.fspath(path).rstrip('/')
  with _told(text, 'written'):
    system = _file_system(text)
    files = [file for file in source.rglob('*') if file.is_file()] if source.is_dir() else [source]
    for file in sorted(files, key=lambda file: (file.name == COMMIT_SUCCESS_FILE, file)):
      system.put_file(os.fspath(file), text if file == source else f'{text}/{file.relative_to(source).as_posix()}')


class Workplace:
  """A folder to write into, as a context: itself, or of a bucket's a copy on this machine, which follows what is done here.

  `folder` is where to work. Files whose names begin with a dot stay here.
  """

  def __init__(self, path: str | os.PathLike, *, resumes: bool = False):
    """`resumes`: whether the work begins with what is there."""
    self._path, self._remote, self._resumes = os.fspath(path).rstrip('/'), is_bucket(path), resumes
    self.folder = pathlib.Path(path)
    self._known: dict[str, tuple[int, int]] = {}  # what is the same there: (size, time) here
    self._pushed = time.monotonic()

  def __enter__(self) -> 'Workplace':
    if self._remote:
      self._scratch = tempfile.TemporaryDirectory(prefix='calrec.')
      self.folder = pathlib.Path(self._scratch.name) / self._path.rpartition('/')[2]
      self.folder.mkdir()
      if self._resumes:
        self.pull()
    return self

  def __exit__(self, *_: object) -> None:
    if self._remote:
      try:
        self.push()
      finally:
        self._scratch.cleanup()

  def push(self, *, every: float = 0.) -> None:
    """Brings what has changed here to the bucket, if the last time was more than `every` seconds ago."""
    if not self._remote or time.monotonic() - self._pushed < every:
      return
    here = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob('*'))
            if path.is_file() and not path.name.startswith('.')}
    with _told(self._path, 'written'):
      system = _file_system(self._path)
      for name, path in here.items():
        state = _state(path)
        if self._known.get(name) != state:
          system.put_file(os.fspath(path), f'{self._path}/{name}')
          self._known[name] = state
      for name in self._known.keys() - here.keys():
        with contextlib.suppress(FileNotFoundError):
          system.rm_file(f'{self._path}/{name}')
        del self._known[name]
    self._pushed = time.monotonic()

  def pull(self) -> None:
    """Brings here what others have written, after `push`."""
    if not self._remote:
      return
    self.push()
    with _told(self._path, 'read'):
      system = _fresh(self._path)
      for name in _listed(system, self._path):
        path = self.folder / name
        if path.name.startswith('.') or '..' in path.parts:
          continue
        path.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(f'{self._path}/{name}', os.fspath(path))
        self._known[name] = _state(path)


def _state(path: pathlib.Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_size, found.st_mtime_ns


def _kept(text: str, kind: str) -> pathlib.Path:
  """Where the copy (`copies`) of a bucket's file or folder lies, or what says of which version it is (`versions`)."""
  scheme, _, rest = text.partition('://')
  parts = [part for part in rest.split('/') if part]
  if '..' in parts:
    raise UserError(f'{text}: ".." is no name here; rename it.')
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
  return pathlib.Path(os.environ.get('CALREC_CACHE') or os.path.join(caches, 'calrec_jax'), kind, scheme, *parts)


def _listed(system: Any, text: str, depth: int | None = None) -> dict[str, dict]:
  """What the bucket says of each file of a folder, by its name there; of a file '' is the name."""
  root = system._strip_protocol(text).rstrip('/')
  found = system.find(text, maxdepth=depth, detail=True)
  return {name.removeprefix(root).lstrip('/'): about for name, about in found.items()
          if about['type'] == 'file' and not name.endswith('/')}


def _fetch(system: Any, text: str, wanted: dict[str, dict]) -> None:
  """Copies the files that are not here, or of another version."""
  from fsspec.utils import tokenize
  stale = []
  for name, about in wanted.items():
    file, version = f'{text}/{name}'.rstrip('/'), tokenize(about)
    copy, told = _kept(file, 'copies'), _kept(file, 'versions')
    if not (copy.is_file() and told.is_file() and told.read_text() == version):
      stale.append((file, version, copy, told, about.get('size') or 0))
  if stale:
    logging.info('Copies %s from %s (%.1f MB).', f'{len(stale)} files' if stale[1:] else 'a file', text,
                 sum(size for *_, size in stale) / 1e6)
  for file, version, copy, told, _ in stale:
    for path in (copy, told):
      path.parent.mkdir(parents=True, exist_ok=True)
    scratch = copy.with_name(f'.{copy.name}.{os.getpid()}')
    try:
      system.get_file(file, os.fspath(scratch))
      os.replace(scratch, copy)
    finally:
      scratch.unlink(missing_ok=True)
    told.write_text(version)


def _forget(text: str, wanted: Collection[str]) -> None:
  """Takes away the copies of a folder's files that are no longer there."""
  versions = _kept(text, 'versions')
  for told in [path for path in versions.rglob('*') if path.is_file()]:
    name = told.relative_to(versions).as_posix()
    if name not in wanted:
      (_kept(text, 'copies') / name).unlink(missing_ok=True)
      told.unlink()


def _file_system(text: str) -> Any:
  """fsspec's file system of a path. UserError: what it needs is not installed, or there is none of that name."""
  scheme = text.partition('://')[0]
  import fsspec
  try:
    return fsspec.filesystem(scheme)
  except ImportError as error:
    extra = 'install calrec_jax[gcs]' if scheme in ('gs', 'gcs') else f'install the package that fsspec asks for ({error})'
    raise UserError(f'{text}: {scheme}:// cannot be reached from here: {extra}.') from error
  except ValueError as error:
    raise UserError(f'{text}: {scheme}:// is nothing that fsspec knows; give a folder, or a bucket such as gs://bucket/folder.'
                    ) from error


def _fresh(text: str | os.PathLike) -> Any:
  """The file system, without what it remembers of earlier listings."""
  system = _file_system(os.fspath(text))
  system.invalidate_cache()
  return system


@contextlib.contextmanager
def _told(path: str | os.PathLike, what: str) -> Iterator[None]:
  """What a bucket refuses becomes a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # each file system has errors of its own
    first = next(iter(str(error).strip().splitlines()), '')[:160]
    raise UserError(f'{os.fspath(path)}: cannot be {what} ({type(error).__name__}: {first}); check the name, your login and '
                    'your rights.') from error
