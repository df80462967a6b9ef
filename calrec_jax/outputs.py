"""Outputs appear whole or not at all: they are written beside their place, then renamed into it. JSON objects are read back."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from calrec_jax import storage
from calrec_jax.errors import UserError


def check_unused(out: str | os.PathLike) -> None:
  """Raises UserError unless `out` is absent or an empty folder."""
  if not storage.is_bucket(out) and pathlib.Path(out).resolve() == pathlib.Path.cwd():
    raise UserError(f'{os.fspath(out)!r}: is the folder in which this runs; name one that is to be made.')
  if storage.names(out) or (storage.exists(out) and not storage.is_dir(out)):
    raise UserError(f'{out}: the output is already in use; choose another place, or remove it first.')


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a scratch folder that becomes `out` when the block ends well, and vanishes when it raises.

  In a bucket the files appear by name, one after the other. Raises UserError if `out` is in use, or cannot be written.
  """
  check_unused(out)
  if storage.is_bucket(out):
    with tempfile.TemporaryDirectory(prefix='calrec.') as work:
      yield pathlib.Path(work)
      storage.upload(pathlib.Path(work), out)
    return
  path = pathlib.Path(out)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror}); choose another place.') from error
  try:
    yield scratch
    scratch.chmod(0o755)
    if path.exists():
      path.rmdir()
    scratch.rename(path)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise


@contextlib.contextmanager
def new_file(out: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a scratch path; when the block ends well it replaces `out`, when it raises it vanishes."""
  if storage.is_bucket(out):
    with tempfile.TemporaryDirectory(prefix='calrec.') as work:
      yield pathlib.Path(work) / 'file'
      storage.upload(pathlib.Path(work) / 'file', out)
    return
  path = pathlib.Path(out)
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    yield scratch
    os.replace(scratch, path)
  finally:
    scratch.unlink(missing_ok=True)


def check_absent(out: str | os.PathLike) -> None:
  """Raises UserError if there is something at `out`, a file to be."""
  if storage.exists(out):
    raise UserError(f'{os.fspath(out)}: the output is already there; choose another place, or remove it first.')


def write_page(out: str | os.PathLike, text: str) -> int:
  """Writes a text for people, whole or not at all; returns its bytes. Raises UserError if it cannot be written."""
  content = text.encode('utf-8', 'replace')
  try:
    with new_file(out) as scratch:
      scratch.write_bytes(content)
  except OSError as error:
    raise UserError(f'{os.fspath(out)}: cannot be written ({error.strerror}); choose another place.') from error
  return len(content)


def write_json(out: str | os.PathLike, value: object) -> None:
  """Writes `value` as indented JSON, whole or not at all."""
  with new_file(out) as scratch:
    scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def read_object(path: pathlib.Path) -> dict:
  """The JSON object in a file. Raises UserError if there is none."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path}: cannot be read as JSON ({" ".join(str(error).split())[:100]}); restore the file.') from error
  if not isinstance(found, dict):
    raise UserError(f'{path}: a JSON {type(found).__name__}, where an object is expected; restore the file.')
  return found
