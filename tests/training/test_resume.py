"""Law 5: a run that was stopped and resumed is the run that never was, bit for bit; stage II starts from stage I's arrays."""

import dataclasses
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
from calrec_jax.training.trainer import Schedule

STEPS = 6
OPTIONS = {'decoder': dataclasses.replace(tiny.DECODER, dropout=0.2),
           'schedule': Schedule(log_every=1, eval_every=0, save_every=2, eval_histories=0)}


class Killed(Exception):
  """Stands for the end of the process."""


def arrays(model_dir: pathlib.Path, step: int) -> dict:
  """Every array of a checkpoint as it lies on disk, by name: parameters, optimizer state, RNG and step."""
  folder = model_dir / checkpoints.FOLDER / str(step)
  with ocp.StandardCheckpointer() as reader:
    tree = {item: reader.restore(folder / item) for item in ('params', 'rest')}
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
  ours, theirs = arrays(one, STEPS), arrays(other, STEPS)
  assert ours.keys() == theirs.keys() and any('opt_state' in name for name in ours) and any('rng' in name for name in ours)
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)
  for term in ('loss', 'nig', 'tt', 'ut', 'gradient_norm'):
    assert tiny.scalars(one, f'train/{term}') == tiny.scalars(other, f'train/{term}')
  assert len(tiny.scalars(one, 'train/loss')) == STEPS


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """The next run dies when it asks for the batch of `step`."""
  prefetched = trainer._prefetched
  def dying(*args):
    for number, batch in prefetched(*args):
      if number == step:
        raise Killed
      yield number, batch
  monkeypatch.setattr(trainer, '_prefetched', dying)


@pytest.fixture(scope='module')
def uninterrupted(tiny_store, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('uninterrupted') / 'run'
  tiny.train(tiny_store, folder, train_steps=STEPS, **OPTIONS)
  return folder


def stopped_and_resumed(store: pathlib.Path, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                        step: int = 5) -> pathlib.Path:
  with monkeypatch.context() as patch:
    killed_at(step, patch)
    with pytest.raises(Killed):
      tiny.train(store, folder, train_steps=STEPS, **OPTIONS)
  assert checkpoints.newest_step(folder) == step // 2 * 2
  tiny.train(store, folder, train_steps=STEPS, **OPTIONS)
  return folder


def test_resumed_is_uninterrupted(uninterrupted, tiny_store, tmp_path, monkeypatch):
  check_same_run(uninterrupted, stopped_and_resumed(tiny_store, tmp_path / 'run', monkeypatch))


def test_the_check_notices_another_rng(uninterrupted, tiny_store, tmp_path, monkeypatch):
  """Mutant: the key is not restored."""
  restore = trainer._restore_or_start
  def mutant(*args, **kwargs):
    state = restore(*args, **kwargs)
    return state.replace(rng=state.rng + 1) if int(state.step) else state
  monkeypatch.setattr(trainer, '_restore_or_start', mutant)
  with pytest.raises(AssertionError):
    check_same_run(uninterrupted, stopped_and_resumed(tiny_store, tmp_path / 'run', monkeypatch))


def test_the_check_notices_a_forgotten_optimizer(uninterrupted, tiny_store, tmp_path, monkeypatch):
  """Mutant: the optimizer's statistics begin anew."""
  restore = trainer._restore_or_start
  def mutant(*args, **kwargs):
    state = restore(*args, **kwargs)
    forget = lambda x: x * 0 if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x
    return state.replace(opt_state=jax.tree.map(forget, state.opt_state)) if int(state.step) else state
  monkeypatch.setattr(trainer, '_restore_or_start', mutant)
  with pytest.raises(AssertionError):
    check_same_run(uninterrupted, stopped_and_resumed(tiny_store, tmp_path / 'run', monkeypatch))


def test_sigterm_saves_and_the_same_command_goes_on(uninterrupted, tiny_store, tmp_path, monkeypatch):
  prefetched = trainer._prefetched
  def terminated(*args):
    for number, batch in prefetched(*args):
      if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
      yield number, batch
  assert threading.current_thread() is threading.main_thread()
  with monkeypatch.context() as patch:
    patch.setattr(trainer, '_prefetched', terminated)
    with pytest.raises(SystemExit) as stop:
      tiny.train(tiny_store, tmp_path / 'run', train_steps=STEPS, **OPTIONS)
  assert stop.value.code == trainer.PREEMPTED and checkpoints.newest_step(tmp_path / 'run') == 3
  tiny.train(tiny_store, tmp_path / 'run', train_steps=STEPS, **OPTIONS)
  check_same_run(uninterrupted, tmp_path / 'run')


def test_stage_two_starts_from_the_arrays_of_stage_one(uninterrupted, tiny_store, tmp_path, monkeypatch):
  first = []
  make = trainer.make_train_step
  def spying(*args):
    step = make(*args)
    def call(state, batch):
      first.append(jax.device_get(state.params))
      return step(state, batch)
    return call
  monkeypatch.setattr(trainer, 'make_train_step', spying)
  tiny.train(tiny_store, tmp_path / 'two', train_steps=1, inputs=tiny.inputs(tiny_store, 'books'),
             initial_checkpoint=str(uninterrupted), **OPTIONS)
  saved = {name.removeprefix("['params']"): array for name, array in arrays(uninterrupted, STEPS).items()
           if name.startswith("['params']")}
  started = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(first[0])}
  assert started.keys() == saved.keys()
  for name, array in started.items():
    np.testing.assert_array_equal(array, saved[name], err_msg=name)


def test_the_newest_steps_are_kept_and_a_half_written_one_is_not_seen(tiny_store, tmp_path):
  folder = tmp_path / 'run'
  schedule = Schedule(log_every=1, eval_every=0, save_every=1, eval_histories=0, keep=2)
  tiny.train(tiny_store, folder, train_steps=4, schedule=schedule)
  steps = {path.name for path in (folder / checkpoints.FOLDER).iterdir() if path.name.isdigit()}
  assert steps == {'3', '4'}
  (folder / checkpoints.FOLDER / '5.orbax-checkpoint-tmp').mkdir()
  assert checkpoints.find(folder).step == 4
  (folder / checkpoints.FOLDER / '4/description/metadata').write_text('{"half')
  with pytest.raises(UserError, match='damaged'):
    checkpoints.find(folder)
