"""Stochastic rounding has no bias, loses no small update on average, and is a function of its key."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.training import rounding
from calrec_jax.training.optimizer import Optimizer

ROUND = jax.jit(jax.vmap(rounding.stochastic_round, in_axes=(None, 0)))
KEYS = jax.random.split(jax.random.key(0), 2000)


def test_the_mean_is_the_value():
  x = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
  drawn = np.asarray(ROUND(x, KEYS), np.float64)
  assert all(len(np.unique(column)) == 2 for column in drawn.T)  # the neighbours below and above
  np.testing.assert_allclose(drawn.mean(0), x, atol=np.abs(x).max() * 2**-8 * 4 / len(KEYS)**0.5)
  nearest = np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)  # the mutant has a bias
  assert np.abs(nearest - x).max() > np.abs(x).max() * 2**-8 * 4 / len(KEYS)**0.5


@settings(deadline=None)  # the first call compiles
@given(st.floats(width=32, max_value=2.0**127, min_value=-(2.0**127), allow_subnormal=False))
def test_a_value_becomes_one_of_its_neighbours(x):
  drawn = np.asarray(rounding.stochastic_round(jnp.float32(x)[None], jax.random.key(3)), np.float64)[0]
  assert abs(drawn - x) <= abs(x) * 2**-7
  exact = float(np.float32(x).astype(ml_dtypes.bfloat16))
  assert float(rounding.stochastic_round(jnp.float32(exact)[None], jax.random.key(3))[0]) == exact


def test_what_is_not_finite_stays_so():
  drawn = rounding.stochastic_round(jnp.array([jnp.inf, -jnp.inf, jnp.nan]), jax.random.key(0)).astype(jnp.float32)
  np.testing.assert_array_equal(drawn, [np.inf, -np.inf, np.nan])


def test_updates_far_below_a_step_are_not_lost():
  weights, tiny = jnp.ones(4000, jnp.bfloat16), 2.0**-12  # a step above 1 is 2**-7
  add = jax.jit(lambda w, key: rounding.stochastic_round(w.astype(jnp.float32) + tiny, key))
  for i in range(64):
    weights = add(weights, jax.random.key(i))
  np.testing.assert_allclose(np.asarray(weights, np.float64).mean(), 1 + 64 * tiny, atol=2e-3 * 64 * tiny + 4e-4)
  assert jnp.bfloat16(1) + jnp.bfloat16(tiny) == 1  # the mutant: rounded to the nearest, it never moves


def test_leaves_have_noise_of_their_own_and_other_types_are_kept():
  tree = {'a': jnp.full(100, 1.001), 'b': jnp.full(100, 1.001), 'n': jnp.arange(3)}
  like = {'a': jnp.zeros(1, jnp.bfloat16), 'b': jnp.zeros(1, jnp.bfloat16), 'n': jnp.arange(3)}
  stored = rounding.store(tree, like, jax.random.key(0))
  assert stored['a'].dtype == jnp.bfloat16 and (stored['a'] != stored['b']).any() and stored['n'].dtype == jnp.int32
  again = rounding.store(tree, like, jax.random.key(0))
  np.testing.assert_array_equal(stored['a'], again['a'])


def test_noise_is_uniform_and_independent_of_index_key_and_leaf():
  n = 2**18
  x = jnp.full((n // 8, 8), 1 + 0.3 * 2**-7, jnp.float32)
  key = lambda step, leaf: jax.random.fold_in(jax.random.fold_in(KEYS[0], step), leaf)
  draw = lambda step, leaf: np.asarray(rounding.stochastic_round(x, key(step, leaf)),
                                       np.float64).ravel() > 1
  first, later, other = draw(0, 0), draw(1, 0), draw(0, 1)
  bound = 5 / n**0.5
  for up in (first, later, other):
    assert abs(up.mean() - 0.3) < bound
  correlation = lambda a, b: abs(np.corrcoef(a, b)[0, 1])
  for shift in (1, 2, 8, 64, 4096):
    assert correlation(first[shift:], first[:-shift]) < bound, shift
  assert correlation(first, later) < bound and correlation(first, other) < bound and correlation(later, other) < bound
  assert correlation(first, draw(0, 0)) > bound  # the mutant: a key that is used again


def test_rounding_needs_no_memory_of_its_own(monkeypatch):
  x = jnp.ones((1000, 1000))
  needed = lambda: jax.jit(lambda x, key: rounding.stochastic_round(x, key)).lower(x, KEYS[0]).compile().memory_analysis()
  assert needed().temp_size_in_bytes < 0.01 * x.nbytes
  monkeypatch.setattr(rounding, '_noise', lambda shape, key: jax.random.bits(key, shape, jnp.uint32))
  assert needed().temp_size_in_bytes > x.nbytes  # the mutant: words for every element


@pytest.mark.parametrize('name', ['adamw', 'adafactor'])
def test_a_quadratic_is_descended_with_parameters_and_state_in_bfloat16(name):
  goal = jnp.asarray(np.random.default_rng(0).normal(size=(130, 140)), jnp.float32)  # large enough for factored statistics
  optimizer = Optimizer(name=name, learning_rate=0.02, warmup_steps=5, weight_decay=0.0, state_dtype='bfloat16').build(200)
  start = {'kernel': jnp.zeros_like(goal, jnp.bfloat16)}
  state = optimizer.init(rounding.as_float32(start))
  assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}
  @jax.jit
  def step(params, state, key):
    exact = rounding.as_float32(params)
    updates, state = optimizer.update(jax.tree.map(lambda w: w - goal, exact), state, exact)
    return rounding.store(optax.apply_updates(exact, updates), params, key), state
  params = start
  for key in KEYS[:200]:
    params, state = step(params, state, key)
  assert params['kernel'].dtype == jnp.bfloat16
  assert jnp.mean((params['kernel'] - goal) ** 2) < 0.01 * jnp.mean(goal**2)


def test_a_stored_optimizer_follows_the_exact_one():
  exact, stored = optax.scale_by_adam(0.9, 0.99), rounding.stored_in_bfloat16(optax.scale_by_adam(0.9, 0.99))
  params = {'w': jnp.ones(500)}
  states = [exact.init(params), stored.init(params)]
  assert {leaf.dtype for leaf in jax.tree.leaves(states[1])} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}
  sums = [np.zeros(500), np.zeros(500)]
  for i in range(40):
    grads = {'w': 1 + 0.5 * jax.random.normal(jax.random.key(i), (500,))}
    for which, optimizer in enumerate((exact, stored)):
      updates, states[which] = optimizer.update(grads, states[which], params)
      sums[which] += np.asarray(updates['w'])
  np.testing.assert_allclose(sums[1].mean(), sums[0].mean(), rtol=2e-3)
