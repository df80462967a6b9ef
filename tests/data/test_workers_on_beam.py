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


@pytest.mark.parametrize('options', [LOCAL, LOCAL[:1]])
def test_what_a_worker_refuses_is_one_line(options):
  def work(part: int) -> None:
    raise UserError(f'part {part}: is broken; mend it.')

  with pytest.raises(UserError) as found:
    workers.run(work, [7], options=options)
  assert str(found.value) == 'part 7: is broken; mend it.'


def test_a_bug_in_a_worker_keeps_its_kind():
  with pytest.raises(ZeroDivisionError):
    workers.run(lambda part: part / 0, [1], options=LOCAL[:1])
