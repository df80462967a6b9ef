"""Several processes: killed, terminated and started again in other numbers, they make the run of one process."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest
import tiny

from calrec_jax.training import checkpoints
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.trainer import Schedule

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 40


class Launched:
  """`launch/local_run.sh` with `calrec train`, on eight devices in so many processes."""

  def __init__(self, store: pathlib.Path, model_dir: pathlib.Path, processes: int, log: pathlib.Path, *more: str):
    arguments = tiny.gin_arguments(
        store, 'stage1', model_dir, *tiny.gin([
            'schedule.log_every=1', 'schedule.eval_every=0', 'schedule.save_every=4', 'LEARNING_RATE=1e-4',
            'objective.alpha=0.3', 'objective.beta=0.2', 'optimizer.warmup_steps=2']), *more, steps=STEPS)
    self.model_dir, self.log = model_dir, log
    with open(log, 'w') as out:
      self.process = subprocess.Popen(
          [ROOT / 'launch/local_run.sh', '--processes', str(processes), '--devices', str(8 // processes), '--', *arguments],
          stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
          env=os.environ | tiny.READS_CACHE | {'JAX_DEFAULT_MATMUL_PRECISION': 'highest'})

  def child(self, number: int) -> int:
    """The process id of one of its processes."""
    own = subprocess.run(['pgrep', '-P', str(self.process.pid), '-f', 'calrec_jax.cli'], capture_output=True, text=True)
    for pid in own.stdout.split():
      environment = pathlib.Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')
      if f'CALREC_PROCESS_ID={number}'.encode() in environment:
        return int(pid)
    raise AssertionError(f'process {number} is not there: {self.log.read_text()[-3000:]}')

  def wait_for_step(self, step: int) -> None:
    deadline = time.monotonic() + 120
    while (checkpoints.newest_step(self.model_dir) or 0) < step:
      assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()[-3000:]
      time.sleep(0.05)

  def end(self) -> int:
    try:
      return self.process.wait(timeout=150)
    finally:
      self.process.kill()


@pytest.mark.slow
def test_killed_terminated_and_in_other_numbers_it_is_the_run_of_one_process(tiny_store, tmp_path):
  model_dir = tmp_path / 'run'
  first = Launched(tiny_store, model_dir, 2, tmp_path / 'log1')
  first.wait_for_step(4)
  os.kill(first.child(1), signal.SIGKILL)
  killed = time.monotonic()
  assert first.end() == 75, (tmp_path / 'log1').read_text()[-3000:]
  assert time.monotonic() - killed < 60
  assert 'process 1 died of signal 9; the others end too. The same command goes on' in (tmp_path / 'log1').read_text()
  reached = checkpoints.newest_step(model_dir)
  assert 4 <= reached < STEPS

  second = Launched(tiny_store, model_dir, 4, tmp_path / 'log2')
  second.wait_for_step(reached + 4)
  os.kill(second.child(3), signal.SIGTERM)
  assert second.end() == 75, (tmp_path / 'log2').read_text()[-3000:]
  left = set(re.findall(r'\[(\d)\] Terminated at step (\d+), which is saved', (tmp_path / 'log2').read_text()))
  assert len(left) == 4 and len({step for _, step in left}) == 1  # all of them, at one step
  assert checkpoints.newest_step(model_dir) == int(left.pop()[1]) < STEPS

  third = Launched(tiny_store, model_dir, 2, tmp_path / 'log3')
  assert third.end() == 0, (tmp_path / 'log3').read_text()[-3000:]
  assert checkpoints.newest_step(model_dir) == STEPS

  tiny.train(tiny_store, tmp_path / 'alone', train_steps=STEPS, objective=tiny.OBJECTIVE,
             optimizer=Optimizer(warmup_steps=2, learning_rate=1e-4), schedule=Schedule(log_every=1, eval_every=0))
  found, whole = tiny.scalars(model_dir, 'train/'), tiny.scalars(tmp_path / 'alone', 'train/')
  for term in ('loss', 'nig', 'tt', 'ut'):
    losses = {step: value for (name, step), value in whole.items() if name == f'train/{term}'}
    assert {step: found[f'train/{term}', step] for step in losses} == pytest.approx(losses, rel=1e-5)
    assert len(losses) == STEPS


@pytest.mark.slow
def test_what_is_wrong_in_all_processes_is_told_and_ends_them(tiny_store, tmp_path):
  launched = Launched(tiny_store, tmp_path / 'run', 2, tmp_path / 'log', '--gin.BATCH_SIZE=3')
  assert launched.end() == 2
  text = (tmp_path / 'log').read_text()
  assert 'BATCH_SIZE = 3 rows do not divide' in text and 'failed with exit code 2' in text and 'Traceback' not in text
