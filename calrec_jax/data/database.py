"""DuckDB for the making of one data set: its folder, its settings, and one line where there is no room."""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import duckdb

from calrec_jax.errors import UserError

MOST_THREADS = 1024  # with 100,000 of them DuckDB ends the process, after minutes


@contextlib.contextmanager
def connect(folder: str | os.PathLike, *, threads: int | None = None, memory_limit: str | None = None
            ) -> Iterator[tuple[duckdb.DuckDBPyConnection, pathlib.Path]]:
  """A connection, and a new folder inside `folder` in which it works; both end with the block.

  Args:
    folder: made if it is not there.
    threads: None: one for each core. No result depends on it, nor on the next.
    memory_limit: such as '2GB'; None: 80 % of the memory. What does not fit is kept on disk.

  Raises:
    UserError: a value that DuckDB does not take, or want of memory or of room on the disk.
  """
  if threads is not None and not 1 <= threads <= MOST_THREADS:
    raise UserError(f'--threads {threads}: give at least one, and at most {MOST_THREADS:,}.')
  if memory_limit is not None and not re.fullmatch(r'\d+(\.\d+)? ?[KMGT]i?B', memory_limit):
    raise UserError(f'--memory_limit {memory_limit}: write a size such as 2GB or 500MB.')
  given = {name: value for name, value in (('threads', threads), ('memory_limit', memory_limit)) if value is not None}
  with (_new_folder(folder) as work, _told(work),
        duckdb.connect(':memory:', config=given | {'temp_directory': str(work / 'spilled')}) as connection):
    connection.execute("SET preserve_insertion_order = true; SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    yield connection, work


@contextlib.contextmanager
def _new_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  try:
    os.makedirs(folder, exist_ok=True)
    work = tempfile.TemporaryDirectory(prefix='calrec.', dir=folder)
  except OSError as error:
    raise UserError(f'{folder}: nothing can be written there ({error.strerror}); choose another --tmp_dir.') from error
  with work:
    yield pathlib.Path(work.name)


@contextlib.contextmanager
def _told(work: pathlib.Path) -> Iterator[None]:
  """Want of memory or of room on the disk becomes a UserError."""
  first_line = lambda error: str(error).splitlines()[0][:200]
  try:
    yield
  except duckdb.Error as error:
    # DuckDB calls it a want of memory, too, when the disk takes no more of what it puts off.
    full = any(words in str(error) for words in ('Could not write', 'failed to offload'))
    if full or isinstance(error, duckdb.IOException):
      raise UserError(f'{work.parent}: DuckDB cannot work there ({first_line(error)}); make room, or choose another --tmp_dir.'
                      ) from error
    if isinstance(error, duckdb.OutOfMemoryException):
      raise UserError(f'DuckDB is out of memory ({first_line(error)}); give a larger --memory_limit, or fewer --threads.'
                      ) from error
    raise
