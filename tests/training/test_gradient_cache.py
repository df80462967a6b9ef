"""Law 3: the gradient cache gives the full batch's loss and gradient, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_partitioning
import tiny

from calrec_jax.models import two_tower
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.training import gradient_cache, partitioning
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import make_train_step, new_state
from calrec_jax.training.trainer import with_vocabulary


@pytest.fixture(scope='module')
def step_of(tiny_store):
  """(microbatches, options) -> metrics and gradients by name."""
  inputs = tiny.inputs(tiny_store)
  corpus = inputs.corpus(inputs.load(), 'train')
  def run(microbatches, *, shape=(1, 1, 1), objective=tiny.OBJECTIVE, batch_size=16, **decoder):
    mesh = MeshShape(*shape).build(jax.devices()[:int(np.prod(shape))])
    plan = BatchPlan(corpus, batch_size=batch_size, length=inputs.length, seed=0, options=RowOptions(window_steps=4))
    config = dataclasses.replace(with_vocabulary(tiny.DECODER, inputs), **decoder)
    model, optimizer = TwoTower(Decoder(config), objective), optax.trace(0.0)
    make_state, shardings = new_state(model, optimizer, plan.shapes, 0, mesh)
    batch = partitioning.global_batch(functools.partial(plan.batch, 1), batch_size, partitioning.batch_sharding(mesh))
    step = make_train_step(model, optimizer, mesh, shardings, microbatches=microbatches)
    state, metrics = step(make_state(), batch)
    return test_partitioning.as_numbers(metrics, state.opt_state.trace) | {
        name: np.asarray(metrics[name]) for name in ('tt_accuracy', 'ut_accuracy')}
  return run


@pytest.fixture(scope='module')
def whole(step_of):
  return step_of(1)


@pytest.mark.parametrize('microbatches, shape', [(2, (1, 1, 1)), (16, (1, 1, 1)), (2, (8, 1, 1)), (4, (2, 2, 2))], ids=str)
def test_the_cached_gradient_is_that_of_the_whole_batch(step_of, whole, microbatches, shape):
  found = step_of(microbatches, shape=shape)
  assert test_partitioning.differing(found, whole) == []
  assert all(np.abs(value).max() > 0 for value in whole.values())


@pytest.mark.parametrize('objective', [Objective(alpha=0.0, beta=0.0), Objective(alpha=0.5, beta=0.5, direction='symmetric')],
                         ids=['no contrast', 'no generation'])
def test_the_ends_of_the_objective(step_of, objective):
  expected = step_of(1, objective=objective)
  assert test_partitioning.differing(step_of(4, objective=objective), expected) == []


def _own_negatives_only(monkeypatch):
  """What gradient accumulation would do: each microbatch has no negatives but its own."""
  plain = two_tower.contrast
  def own(towers, batch, objective):
    half = max(len(batch['span_texts']) // 2, 1)
    first = lambda tree: jax.tree.map(lambda x: x[:half], tree)
    return plain(first(towers), first(dict(batch)), objective)
  monkeypatch.setattr(two_tower, 'contrast', own)


def _local_denominator(monkeypatch):
  plain = TwoTower.rows
  def rows(self, batch, *, train=False):
    nll, pooled = plain(self, batch, train=train)
    return nll / jnp.sum(batch['loss_weights']), pooled
  monkeypatch.setattr(TwoTower, 'rows', rows)


def _not_pulled_back(monkeypatch):
  plain = two_tower.pooled
  def stopped(hidden, alone, batch, **options):
    return jax.lax.stop_gradient(plain(hidden, alone, batch, **options))
  monkeypatch.setattr(two_tower, 'pooled', stopped)


def _rows_in_another_order(monkeypatch):
  monkeypatch.setattr(gradient_cache, '_whole', lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree))


@pytest.mark.parametrize('mutant', [_own_negatives_only, _local_denominator, _not_pulled_back, _rows_in_another_order])
def test_mutants_of_the_cache_fail(step_of, whole, monkeypatch, mutant):
  mutant(monkeypatch)
  wrong = test_partitioning.differing(step_of(4), whole)
  assert len(wrong) > 3


def test_dropout_is_the_same_in_both_passes(step_of, monkeypatch):
  """The embeddings that the contrast is a loss of are those that its gradient is pulled back through."""
  options = dict(dropout=0.5, batch_size=8)
  found, again = step_of(4, **options), step_of(4, **options)
  assert test_partitioning.differing(found, again) == []
  plain, second = TwoTower.rows, []
  def noted(self, batch, *, train=False):
    nll, rows = plain(self, batch, train=train)
    if train:  # parameters are drawn without
      jax.debug.callback(lambda x: second.append(np.asarray(x)), rows.user_BED)
    return nll, rows
  monkeypatch.setattr(TwoTower, 'rows', noted)
  first, embed_rows = [], TwoTower.embed_rows
  def noted_first(self, batch, *, train=False):
    rows = embed_rows(self, batch, train=train)
    jax.debug.callback(lambda x: first.append(np.asarray(x)), rows.user_BED)
    return rows
  monkeypatch.setattr(TwoTower, 'embed_rows', noted_first)
  step_of(4, **options)
  jax.effects_barrier()
  key = lambda x: x.tobytes()
  assert len(first) == len(second) == 4
  np.testing.assert_allclose(sorted(first, key=key), sorted(second, key=key), rtol=1e-6)
