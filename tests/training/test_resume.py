"""Law 5: killed or terminated at any step and resumed = never stopped, bit for bit."""

import dataclasses
import hashlib
import os
import pathlib
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from calrec_jax.errors import UserError
from calrec_jax.training import checkpoints, trainer
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.preemption import termination
from calrec_jax.training.trainer import Schedule

STEPS = 6
DROPOUT = {'decoder': dataclasses.replace(tiny.DECODER, dropout=0.2)}


class Killed(BaseException):
  """What no code of ours catches."""


class Run:
  """`tiny.train` in a folder, stopped or not; remembers which batches were trained on."""

  def __init__(self, store: pathlib.Path, model_dir: pathlib.Path):
    self.store, self.model_dir, self.batches = store, model_dir, {}

  def go(self, monkeypatch, before_step=lambda step: None, **options) -> dict[str, float]:
    prefetched = trainer._prefetched
    def watched(plan, mesh, start, stop):
      for step, batch in prefetched(plan, mesh, start, stop):
        before_step(step)
        digest = hashlib.sha256(b''.join(np.asarray(batch[name]).tobytes() for name in sorted(batch))).hexdigest()
        assert self.batches.setdefault(step, digest) == digest  # a step that is done again has the same batch
        yield step, batch
    with monkeypatch.context() as patch:
      patch.setattr(trainer, '_prefetched', watched)
      return tiny.train(self.store, self.model_dir, **{'train_steps': STEPS, **DROPOUT, **options})

  def state(self) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint, by name."""
    found = checkpoints.find(self.model_dir)
    with ocp.StandardCheckpointer() as checkpointer:
      trees = {item: checkpointer.restore(found.folder / item) for item in ('params', 'rest')}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}

  def logged(self) -> dict[tuple[str, int], float]:
    found = tiny.scalars(self.model_dir)
    return {key: value for key, value in found.items() if not key[0].endswith('_per_second')}


def differing(run: Run, expected: Run) -> list[object]:
  """What is not the same bit for bit: arrays of the last checkpoint, logged values, batches."""
  found, whole = run.state(), expected.state()
  assert found.keys() == whole.keys()
  names: list[object] = [name for name in whole if found[name].tobytes() != whole[name].tobytes()]
  logged = run.logged()
  names += [key for key, value in expected.logged().items() if logged.get(key) != value]
  return names + [step for step, digest in expected.batches.items() if run.batches.get(step) != digest]


def kill_at(stop: int):
  def before_step(step: int) -> None:
    if step == stop:
      raise Killed
  return before_step


@pytest.fixture(scope='module')
def uninterrupted(tiny_store, tmp_path_factory) -> Run:
  run = Run(tiny_store, tmp_path_factory.mktemp('uninterrupted') / 'run')
  with pytest.MonkeyPatch.context() as patch:
    run.go(patch)
  return run


@pytest.mark.parametrize('stop, goes_on_from', [(1, None), (3, 2), (5, 4)])
def test_killed_and_resumed_is_never_killed(tiny_store, uninterrupted, tmp_path, monkeypatch, stop, goes_on_from):
  run = Run(tiny_store, tmp_path / 'run')
  with pytest.raises(Killed):
    run.go(monkeypatch, kill_at(stop))
  assert checkpoints.newest_step(run.model_dir) == goes_on_from
  run.go(monkeypatch)
  assert differing(run, uninterrupted) == []
  assert len(run.batches) == STEPS and len(set(run.batches.values())) == STEPS


def test_averaged_parameters_go_on_too(tiny_store, tmp_path, monkeypatch):
  averaged = {'optimizer': Optimizer(warmup_steps=2, average_decay=0.9)}
  whole, run = Run(tiny_store, tmp_path / 'whole'), Run(tiny_store, tmp_path / 'run')
  whole.go(monkeypatch, **averaged)
  with pytest.raises(Killed):
    run.go(monkeypatch, kill_at(3), **averaged)
  run.go(monkeypatch, **averaged)
  assert differing(run, whole) == []
  assert any('trained' in name for name in whole.state())
  with pytest.raises(UserError, match='averages is True there, False here') as error:
    run.go(monkeypatch, allow_changes=True)
  assert 'allow_changes' not in str(error.value)  # which would not help


def without_optimizer(rest):
  return rest | {'opt_state': jax.tree.map(lambda x: x * 0, rest['opt_state'])}


def with_another_key(rest):
  return rest | {'rng': rest['rng'] + 1}


@pytest.mark.parametrize('mutant', [without_optimizer, with_another_key])
def test_a_restore_that_forgets_something_is_noticed(tiny_store, uninterrupted, tmp_path, monkeypatch, mutant):
  run = Run(tiny_store, tmp_path / 'run')
  with pytest.raises(Killed):
    run.go(monkeypatch, kill_at(4))
  load = checkpoints.load
  def forgetful(found, **items):
    restored = load(found, **items)
    return restored | {'rest': mutant(restored['rest'])}
  monkeypatch.setattr(checkpoints, 'load', forgetful)
  run.go(monkeypatch)
  wrong = differing(run, uninterrupted)
  assert ('train/loss', 6) in wrong and any('params' in str(name) for name in wrong)


def test_batches_that_begin_anew_are_noticed(tiny_store, uninterrupted, tmp_path, monkeypatch):
  run = Run(tiny_store, tmp_path / 'run')
  with pytest.raises(Killed):
    run.go(monkeypatch, kill_at(4))
  prefetched = trainer._prefetched
  monkeypatch.setattr(trainer, '_prefetched', lambda plan, mesh, start, stop: (
      (step + start, batch) for step, batch in prefetched(plan, mesh, 0, stop - start)))
  run.batches = {}
  run.go(monkeypatch)
  wrong = differing(run, uninterrupted)
  assert {4, 5} <= set(wrong) and ('train/loss', 6) in wrong


def test_sigterm_saves_and_leaves_and_the_same_call_goes_on(tiny_store, uninterrupted, tmp_path, monkeypatch):
  run, handler = Run(tiny_store, tmp_path / 'run'), signal.getsignal(signal.SIGTERM)
  def terminate(step: int) -> None:
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
  late = Schedule(log_every=1, eval_every=0, save_every=100)
  with pytest.raises(SystemExit) as left:
    run.go(monkeypatch, terminate, schedule=late)
  assert left.value.code == 75
  assert checkpoints.newest_step(run.model_dir) == 3
  assert signal.getsignal(signal.SIGTERM) == handler
  assert not any(name.startswith('validation') for name, _ in run.logged())  # a grace period is short
  run.go(monkeypatch, schedule=late)
  assert differing(run, uninterrupted) == []


def test_sigterm_in_the_last_step_ends_as_usual(tiny_store, tmp_path, monkeypatch):
  run = Run(tiny_store, tmp_path / 'run')
  assert run.go(monkeypatch, lambda step: step == STEPS - 1 and os.kill(os.getpid(), signal.SIGTERM))['loss'] > 0
  assert checkpoints.newest_step(run.model_dir) == STEPS


def test_a_finished_run_has_nothing_to_do(tiny_store, uninterrupted, monkeypatch):
  before = uninterrupted.state()
  Run(tiny_store, uninterrupted.model_dir).go(monkeypatch)
  assert {name: x.tobytes() for name, x in before.items()} == {
      name: x.tobytes() for name, x in uninterrupted.state().items()}


def test_other_threads_leave_signals_alone():
  found = []
  def look() -> None:
    with termination() as asked:
      found.append((asked(1), signal.getsignal(signal.SIGTERM)))
  thread = threading.Thread(target=look)
  thread.start()
  thread.join()
  assert found == [(False, signal.getsignal(signal.SIGTERM))]


def test_a_bug_in_a_run_keeps_what_was_saved(tiny_store, tmp_path, monkeypatch):
  run = Run(tiny_store, tmp_path / 'run')
  def fail(step: int) -> None:
    if step == 2:
      raise ZeroDivisionError
  with pytest.raises(ZeroDivisionError):
    run.go(monkeypatch, fail)
  assert [p.name for p in (run.model_dir / 'checkpoints').iterdir()] == ['2']  # whole: nothing half-written beside it
