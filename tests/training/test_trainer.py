"""Law 5: killed or terminated at any step and resumed = never stopped, bit for bit; and what a run leaves behind."""

import dataclasses
import hashlib
import json
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
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import OnePass, RowOptions
from calrec_jax.training import checkpoints, trainer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import init_params, make_eval_step
from calrec_jax.training.trainer import Meter, Schedule, evaluate_loss, with_vocabulary

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
    with trainer._termination() as event:
      found.append((event.is_set(), signal.getsignal(signal.SIGTERM)))
  thread = threading.Thread(target=look)
  thread.start()
  thread.join()
  assert found == [(False, signal.getsignal(signal.SIGTERM))]


def test_the_run_folder_tells_what_the_run_was(tiny_store, uninterrupted):
  folder = uninterrupted.model_dir
  names = {path.name for path in folder.iterdir()}
  assert {'config.gin', 'run.json', 'vocabulary.json', 'checkpoints'} <= names
  facts = json.loads((folder / 'run.json').read_text())
  data = {source.histories.name: source.histories.fingerprint for source in tiny.inputs(tiny_store).load()}
  assert facts['seed'] == 0 and facts['data'] == data and set(data) == set(tiny.NAMES)
  assert {'calrec_jax', 'jax', 'flax', 'optax', 'numpy', 'python'} <= facts['versions'].keys()
  assert facts['mesh'] == {'data': 8, 'fsdp': 1, 'model': 1}
  description = checkpoints.find(folder).description
  assert description['data'] == data and description['decoder']['n_layers'] == 2
  assert description['vocabulary'] == tiny.inputs(tiny_store).vocabulary.fingerprint
  assert (folder / 'vocabulary.json').read_text() == (tiny_store / 'vocabulary.json').read_text()


def test_tensorboard_has_every_term(uninterrupted):
  found = tiny.scalars(uninterrupted.model_dir)
  for term in ('loss', 'nig', 'tt', 'ut', 'spans', 'target_tokens', 'tokens', 'gradient_norm', 'learning_rate',
               'spans_per_second', 'tokens_per_second', 'steps_per_second'):
    assert sorted(step for name, step in found if name == f'train/{term}') == list(range(1, STEPS + 1)), term
  for split, step in [('train', 3), ('validation', STEPS)]:
    loss, nig, tt, ut = (found[f'{split}/{term}', step] for term in ('loss', 'nig', 'tt', 'ut'))
    assert loss == pytest.approx(tiny.OBJECTIVE.total(nig, tt, ut), rel=1e-5)
  assert found['train/loss', STEPS] < found['train/loss', 1]


def test_a_bug_in_a_run_keeps_what_was_saved(tiny_store, tmp_path, monkeypatch):
  run = Run(tiny_store, tmp_path / 'run')
  def fail(step: int) -> None:
    if step == 2:
      raise ZeroDivisionError
  with pytest.raises(ZeroDivisionError):
    run.go(monkeypatch, fail)
  assert [p.name for p in (run.model_dir / 'checkpoints').iterdir()] == ['2']  # whole: nothing half-written beside it


def test_validation_means_are_weighted_by_what_they_are_means_over():
  rows = [{'nig': 2.0, 'tt': 1.0, 'ut': 3.0, 'target_tokens': 10.0, 'spans': 1.0, 'loss': 99.0, 'tokens': 1.0},
          {'nig': 5.0, 'tt': 2.0, 'ut': 6.0, 'target_tokens': 20.0, 'spans': 3.0, 'loss': 99.0, 'tokens': 1.0}]
  class Batches:
    shapes = type('Shapes', (), {'B': 8})
    def __len__(self):
      return len(rows)
    def batch(self, step, chosen):
      return {'number': np.full(8, step)[chosen]}
  objective = Objective(alpha=0.25, beta=0.5)
  means = evaluate_loss(lambda _, batch: rows[int(batch['number'][0])], None, Batches(), MeshShape().build(), objective)
  assert means == pytest.approx({'nig': 4.0, 'tt': 1.75, 'ut': 5.25, 'loss': 0.25 * 4 + 0.25 * 1.75 + 0.5 * 5.25})


def test_validation_of_many_batches_is_that_of_one(tiny_store):
  inputs, mesh = tiny.inputs(tiny_store), MeshShape().build()
  model = TwoTower(Decoder(with_vocabulary(tiny.DECODER, inputs)), Objective(alpha=0.0, beta=0.0))
  corpus, rows, found = inputs.corpus(inputs.load(), 'validation'), RowOptions(targets='last'), []
  for batch_size in (8, 48):
    batches = OnePass(corpus, batch_size=batch_size, length=inputs.length, options=rows)
    params = jax.tree.map(lambda x: x, init_params(model, jax.random.key(0), batches.shapes))
    unboxed = jax.tree.map(lambda box: box.value, params, is_leaf=lambda x: hasattr(x, 'names'))
    shardings = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), unboxed)
    step = make_eval_step(model, mesh, shardings)
    found.append((len(batches), evaluate_loss(step, unboxed, batches, mesh, model.objective)))
  (many, means), (one, whole) = found
  assert many > 1 == one
  assert means == pytest.approx(whole, rel=1e-5)


def test_meter_means_and_rates(monkeypatch):
  clock = iter([10.0, 14.0, 14.0])
  monkeypatch.setattr(trainer.time, 'monotonic', lambda: next(clock))
  meter = Meter(0)
  for spans, loss in [(2, 1.0), (4, 2.0)]:
    meter.add({'spans': np.int32(spans), 'tokens': np.int32(10 * spans), 'loss': np.float32(loss)})
  assert meter.read(2) == {'spans': 3.0, 'tokens': 30.0, 'loss': 1.5, 'spans_per_second': 1.5,
                           'tokens_per_second': 15.0, 'steps_per_second': 0.5}


def test_the_embedding_has_a_row_for_each_token_and_divides(tiny_store):
  inputs = tiny.inputs(tiny_store)
  assert inputs.vocabulary.vocab_size <= with_vocabulary(tiny.DECODER, inputs).vocab_size == 384
  assert with_vocabulary(dataclasses.replace(tiny.DECODER, vocab_size=1000), inputs).vocab_size == 1000
  with pytest.raises(UserError, match='vocab_size = 100'):
    with_vocabulary(dataclasses.replace(tiny.DECODER, vocab_size=100), inputs)


@pytest.mark.parametrize('make, message', [
    (lambda path: path.write_text('x'), 'is a file'),
    (lambda path: (path.mkdir(), (path / 'thesis.tex').write_text('x')), 'in use')])
def test_a_foreign_folder_is_refused_and_left_alone(tiny_store, tmp_path, make, message):
  make(tmp_path / 'out')
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(UserError, match=message):
    tiny.train(tiny_store, tmp_path / 'out')
  assert sorted(tmp_path.rglob('*')) == before


def test_a_place_that_cannot_be_written(tiny_store, tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='cannot be written|is a file'):
    tiny.train(tiny_store, tmp_path / 'file' / 'run')


def test_rows_that_do_not_divide_are_told_before_anything_is_written(tiny_store, tmp_path):
  with pytest.raises(UserError, match='BATCH_SIZE = 12'):
    tiny.train(tiny_store, tmp_path / 'run', batch_size=12)
  with pytest.raises(UserError, match='8 devices'):
    tiny.train(tiny_store, tmp_path / 'run', mesh=MeshShape(3))
  assert list(tmp_path.iterdir()) == []
