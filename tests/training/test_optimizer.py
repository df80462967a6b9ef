"""The optimizer: AdamW is its formula, schedules have their values, Adafactor descends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from calrec_jax.errors import UserError
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.rows import Shapes
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.train_step import init_params

PLAIN = Optimizer(learning_rate=0.1, schedule='constant', warmup_steps=0, weight_decay=0.0, clip_norm=None)


def run(optimizer: Optimizer, params, gradients, train_steps: int = 100):
  """The parameters after an update with each of the gradients."""
  transformation = optimizer.build(train_steps)
  state = transformation.init(params)
  for gradient in gradients:
    updates, state = transformation.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def adamw(p, gradients, *, rate, b1, b2, decay, epsilon=1e-8):
  """AdamW (Loshchilov and Hutter 2019) as its paper writes it; rate(step) from 0."""
  m = v = 0.0
  for step, g in enumerate(gradients):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
    p = p - rate(step) * (m_hat / (np.sqrt(v_hat) + epsilon) + decay * p)
  return p


@pytest.mark.parametrize('changes', [{}, {'weight_decay': 0.3}, {'b1': 0.5, 'b2': 0.9}, {'warmup_steps': 3},
                                     {'schedule': 'linear', 'warmup_steps': 1}], ids=str)
def test_adamw_is_its_formula(changes):
  rng = np.random.default_rng(0)
  optimizer = dataclasses.replace(PLAIN, **changes)
  p, gradients = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(5, 3, 4)).astype(np.float32)
  found = run(optimizer, {'kernel': jnp.asarray(p)}, [{'kernel': jnp.asarray(g)} for g in gradients], train_steps=6)
  schedule = optimizer.rate(6)
  def expected(decay=optimizer.weight_decay, rate=schedule):
    return adamw(p, gradients, rate=lambda step: float(rate(step)), b1=optimizer.b1, b2=optimizer.b2, decay=decay)
  np.testing.assert_allclose(found['kernel'], expected(), rtol=1e-5, atol=1e-6)
  # Mutants: decay left out (or in), the rate of the step before.
  assert not np.allclose(found['kernel'], expected(decay=optimizer.weight_decay - 0.3), rtol=1e-3)
  if 'warmup_steps' in changes:
    assert not np.allclose(found['kernel'], expected(rate=lambda step: schedule(max(step - 1, 0))), rtol=1e-3)


def test_weight_decay_leaves_norm_scales_and_biases_alone():
  params = {'attention_norm': {'scale': jnp.ones(3)}, 'final_norm': {'scale': jnp.ones(3)}, 'kernel': jnp.ones((3, 3)),
            'embedding': jnp.ones((3, 3)), 'query': {'bias': jnp.ones((2, 3))}}
  zero = jax.tree.map(jnp.zeros_like, params)
  after = run(dataclasses.replace(PLAIN, weight_decay=0.5), params, [zero])
  np.testing.assert_array_equal(after['attention_norm']['scale'], 1)
  np.testing.assert_array_equal(after['final_norm']['scale'], 1)
  np.testing.assert_array_equal(after['query']['bias'], 1)
  np.testing.assert_allclose(after['kernel'], 1 - 0.1 * 0.5, rtol=1e-6)
  np.testing.assert_allclose(after['embedding'], 1 - 0.1 * 0.5, rtol=1e-6)


def test_the_decoder_has_no_other_vectors_than_norm_scales():
  model = TwoTower(Decoder(dataclasses.replace(tiny.DECODER, vocab_size=128)), tiny.OBJECTIVE)
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0), Shapes(1, 8, 8, 1, 1)))
  boxes = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: hasattr(x, 'names'))
  vectors = {jax.tree_util.keystr(path) for path, box in boxes if set(box.names) <= {'layers', 'norm'}}
  assert vectors == {jax.tree_util.keystr(path) for path, _ in boxes if 'scale' in jax.tree_util.keystr(path)} != set()


def test_gradients_are_clipped_by_their_global_norm():
  params = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
  large = {'a': jnp.array([30.0, 0.0]), 'b': jnp.array([0.0, 40.0])}
  def seen(gradient, **changes):
    transformation = dataclasses.replace(PLAIN, b1=0.0, **changes).build(10)
    state = transformation.update(gradient, transformation.init(params), params)[1]
    return next(s for s in state if hasattr(s, 'mu')).mu
  np.testing.assert_allclose(seen(large, clip_norm=1.0)['a'], [0.6, 0], rtol=1e-6)
  np.testing.assert_allclose(seen(large, clip_norm=1.0)['b'], [0, 0.8], rtol=1e-6)
  np.testing.assert_allclose(seen(large, clip_norm=None)['a'], [30, 0], rtol=1e-6)
  small = jax.tree.map(lambda x: x / 100, large)
  np.testing.assert_allclose(seen(small, clip_norm=1.0)['b'], [0, 0.4], rtol=1e-6)


def test_clipping_may_be_switched_off_in_a_resumed_run():
  params = {'a': jnp.zeros(2)}
  structures = {jax.tree.structure(dataclasses.replace(PLAIN, clip_norm=norm).build(10).init(params)) for norm in (None, 1.)}
  assert len({str(structure) for structure in structures}) == 1


PEAK = 0.8
SCHEDULES = {
    'constant': [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8],
    'linear': [0.2, 0.4, 0.6, 0.8] + [PEAK * (1 - 0.8 * i / 5) for i in range(5)],
    'cosine': [0.2, 0.4, 0.6, 0.8] + [PEAK * (0.2 + 0.8 * (1 + np.cos(np.pi * i / 5)) / 2) for i in range(5)],
    'rsqrt': [0.2, 0.4, 0.6, 0.8] + [PEAK * np.sqrt(4 / (4 + i)) for i in range(5)]}


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedules(schedule):
  rate = Optimizer(learning_rate=PEAK, schedule=schedule, warmup_steps=4, final_fraction=0.2).rate(9)
  np.testing.assert_allclose([float(rate(step)) for step in range(9)], SCHEDULES[schedule], rtol=1e-5)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('warmup_steps, train_steps', [(0, 5), (10, 5), (0, 1), (3, 3)])
def test_short_runs_have_a_rate_in_every_step(schedule, warmup_steps, train_steps):
  rate = Optimizer(learning_rate=PEAK, schedule=schedule, warmup_steps=warmup_steps).rate(train_steps)
  values = [float(rate(step)) for step in range(train_steps)]
  assert all(0 < value <= PEAK * (1 + 1e-6) for value in values)
  if warmup_steps > train_steps:
    assert values == pytest.approx([PEAK * (step + 1) / train_steps for step in range(train_steps)])


@pytest.mark.parametrize('name', ['adamw', 'adafactor'])
def test_a_quadratic_is_descended(name):
  rng = np.random.default_rng(0)
  goal = jnp.asarray(rng.normal(size=(130, 140)), jnp.float32)  # large enough for factored statistics
  optimizer = Optimizer(name=name, learning_rate=0.1, warmup_steps=5, weight_decay=0.0)
  transformation = optimizer.build(100)
  loss = lambda params: jnp.mean((params['kernel'] - goal) ** 2)
  params = {'kernel': jnp.zeros_like(goal)}
  state = transformation.init(params)
  @jax.jit
  def step(params, state):
    updates, state = transformation.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
  start = float(loss(params))
  for _ in range(100):
    params, state = step(params, state)
  assert float(loss(params)) < 0.01 * start
  n_state = sum(leaf.size for leaf in jax.tree.leaves(state))
  assert n_state < 0.1 * goal.size if name == 'adafactor' else n_state > 2 * goal.size


@pytest.mark.parametrize('options, named', [({'name': 'sgd'}, 'sgd'), ({'schedule': 'step'}, 'step'),
                                            ({'state_dtype': 'float16'}, 'float16')])
def test_unknown_choices(options, named):
  with pytest.raises(UserError, match=f"{named}.*choose"):
    Optimizer(**options)
