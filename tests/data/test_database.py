"""DuckDB's work: what has no room in memory goes to the disk and changes nothing; where there is no room either it is told."""

import contextlib
import os
import resource

import pytest

from calrec_jax.data import database
from calrec_jax.errors import UserError

ROWS = 'CREATE TABLE rows AS SELECT range AS a, hash(range) AS b, md5(range::VARCHAR) AS c FROM range(800_000)'
NUMBERED = 'SELECT count(*), bit_xor(hash(a, c, place)) FROM (SELECT *, row_number() OVER (ORDER BY b) AS place FROM rows)'


def test_what_does_not_fit_goes_to_the_disk_changes_nothing_and_leaves_nothing(tmp_path):
  found, spilled = [], []
  for limit in (None, '40MB'):
    with database.connect(tmp_path, memory_limit=limit, threads=2) as (connection, work):
      connection.execute(ROWS)
      spilled.append((work / 'spilled').exists() and sum(path.stat().st_size for path in (work / 'spilled').iterdir()))
      found.append(connection.execute(NUMBERED).fetchone())
  assert found[0] == found[1]
  assert not spilled[0] and spilled[1] > 10**6
  assert not os.listdir(tmp_path)


@contextlib.contextmanager
def small_files():
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('limited', [small_files, lambda: contextlib.nullcontext("SET max_temp_directory_size = '1MB'")],
                         ids=['a file cannot grow', 'all that there was is used'])
def test_no_room_on_the_disk_is_told(tmp_path, limited):
  with (pytest.raises(UserError, match=f'^{tmp_path}: DuckDB cannot work there .*; make room, or choose another --tmp_dir.$'),
        limited() as setting, database.connect(tmp_path, memory_limit='40MB', threads=2) as (connection, _)):
    connection.execute(setting or 'SELECT 1')
    connection.execute(ROWS)
  assert not os.listdir(tmp_path)
