"""Parts are worked on by processes of Beam's local runner, several of them."""

import os
import pathlib
import time

import pytest

from calrec_jax.data import workers
from calrec_jax.errors import UserError

LOCAL = ['--runner=FnApiRunner', '--direct_num_workers=2', '--direct_running_mode=multi_processing']

pytestmark = pytest.mark.beam


def test_two_processes_share_the_parts(tmp_path):
  def work(part: int) -> None:
    (pathlib.Path(tmp_path) / f'{part}').write_text(str(os.getpid()))
    time.sleep(0.02)

  workers.run(work, range(40), options=LOCAL)
  done = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
  assert set(done) == {str(part) for part in range(40)}
  assert len(set(done.values())) == 2 and os.getpid() not in done.values()
  assert not [pid for pid in set(done.values()) if pathlib.Path(f'/proc/{pid}').exists()]  # none of them is left


def test_an_unknown_runner_is_refused():
  with pytest.raises(UserError, match='Apache Beam refuses its options: .*FnApiRuner'):
    workers.run(print, [1], options=['--runner=FnApiRuner'])
