"""One training step: it descends, dropout changes with the step alone, evaluation has no dropout."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny
from flax import traverse_util

from calrec_jax.models.decoder import Decoder
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import make_eval_step, make_train_step, new_state
from calrec_jax.training.trainer import with_vocabulary

ONE = MeshShape(1)


class Setup:
  """A model, a batch and a fresh state on one device."""

  def __init__(self, store, dropout: float, optimizer: optax.GradientTransformation):
    inputs = tiny.inputs(store)
    decoder = dataclasses.replace(with_vocabulary(tiny.DECODER, inputs), dropout=dropout)
    self.model, self.optimizer = TwoTower(Decoder(decoder), tiny.OBJECTIVE), optimizer
    self.mesh = ONE.build(jax.devices()[:1])
    plan = BatchPlan(inputs.corpus(inputs.load(), 'train'), batch_size=4, length=64, seed=0, options=RowOptions(window_steps=4))
    self.batch, self.shapes = plan.batch(0), plan.shapes
    self.make_state, self.shardings = new_state(self.model, optimizer, plan.shapes, 0, self.mesh)

  def losses(self, n_steps: int, state=None) -> list[float]:
    step = make_train_step(self.model, self.optimizer, self.mesh, self.shardings)
    state, losses = state or self.make_state(), []
    for _ in range(n_steps):
      state, metrics = step(state, self.batch)
      losses.append(float(metrics['loss']))
    self.state = state
    return losses


@pytest.fixture(scope='module')
def frozen(tiny_store):
  """Dropout, and an optimizer that changes nothing."""
  return Setup(tiny_store, 0.3, optax.set_to_zero())


def test_dropout_is_another_in_each_step_and_the_same_in_the_same_step(frozen):
  losses = frozen.losses(4)
  assert len(set(losses)) == 4
  state = frozen.make_state()
  assert frozen.losses(1, state.replace(step=state.step + 2)) == [losses[2]]
  assert int(frozen.state.step) == 3


def test_dropout_that_forgets_the_step_is_noticed(frozen, monkeypatch):
  monkeypatch.setattr(jax.random, 'fold_in', lambda key, step: key)
  assert len(set(frozen.losses(3))) == 1


def test_evaluation_has_no_dropout(frozen):
  step, params = make_eval_step(frozen.model, frozen.mesh, frozen.shardings.params), frozen.make_state().params
  losses = {float(step(params, frozen.batch)[0]['loss']) for _ in range(2)}
  assert len(losses) == 1
  assert losses.isdisjoint(frozen.losses(2))


def test_the_loss_goes_down_and_its_gradient_is_measured(tiny_store):
  setup = Setup(tiny_store, 0.0, Optimizer(learning_rate=0.01, warmup_steps=0, schedule='constant').build(20))
  losses = setup.losses(20)
  assert losses[-1] < 0.6 * losses[0]
  assert all(np.isfinite(losses))


def test_weights_and_dropout_come_from_the_seed(tiny_store, frozen):
  again = Setup(tiny_store, 0.3, optax.set_to_zero()).make_state()
  same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), again, frozen.make_state())
  assert all(jax.tree.leaves(same))
  other = new_state(frozen.model, frozen.optimizer, frozen.shapes, 1, frozen.mesh)[0]()
  assert not np.array_equal(other.params['decoder']['embedding'], again.params['decoder']['embedding'])
  assert not np.array_equal(other.rng, again.rng)



@pytest.mark.parametrize('param_dtype, tolerance', [('float32', 1e-6), ('bfloat16', 0.03)])
def test_averaged_parameters_are_the_moving_average_of_the_trained_ones(tiny_store, param_dtype, tolerance):
  inputs, mesh, decay = tiny.inputs(tiny_store), ONE.build(jax.devices()[:1]), 0.3
  decoder = dataclasses.replace(with_vocabulary(tiny.DECODER, inputs), param_dtype=param_dtype)
  model, optimizer = TwoTower(Decoder(decoder), tiny.OBJECTIVE), optax.sgd(0.1)
  plan = BatchPlan(inputs.corpus(inputs.load(), 'train'), batch_size=4, length=64, seed=0, options=RowOptions(window_steps=4))
  trained = lambda path: 'embedding' not in path
  make_state, shardings = new_state(model, optimizer, plan.shapes, 0, mesh, trained, averages=True)
  step = make_train_step(model, optimizer, mesh, shardings, trained, average_decay=decay)
  state = make_state()
  flat = lambda tree: {path: np.asarray(leaf, np.float32) for path, leaf in traverse_util.flatten_dict(tree).items()}
  expected, first = flat(state.average), flat(state.params)
  for number in range(6):
    state, _ = step(state, plan.batch(number))
    d = min(decay, (1 + number) / (10 + number))
    expected = {path: d * value + (1 - d) * flat(state.params)[path] for path, value in expected.items()}
  found, judged = flat(state.average), flat(state.judged)
  assert not any('embedding' in path for path in found) and judged.keys() == first.keys()
  for path, value in expected.items():
    scale = np.abs(value).max()
    np.testing.assert_allclose(found[path], value, rtol=0, atol=tolerance * scale)
    np.testing.assert_array_equal(judged[path], found[path])
    assert np.abs(found[path] - flat(state.params)[path]).max() > 0
  assert all(leaf.dtype == param_dtype for leaf in jax.tree.leaves(state.average))
