"""The head's loss in blocks is the sum of cross-entropies, with its gradient; empty blocks are not run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calrec_jax.models import head
from calrec_jax.models.head import weighted_nll

B, L, D, V = 3, 8, 5, 11


def inputs(seed=0, targets=0.5):
  rng = np.random.default_rng(seed)
  hidden_BLD, table_VD = (rng.normal(size=shape).astype(np.float32) for shape in ((B, L, D), (V, D)))
  weights_BL = (rng.random((B, L)) < targets) * rng.uniform(0.5, 2, (B, L)).astype(np.float32)
  return hidden_BLD, table_VD, rng.integers(0, V, (B, L)), weights_BL


def plain(hidden_BLD, table_VD, labels_BL, weights_BL, cap=None):
  logits = hidden_BLD @ table_VD.T
  logits = logits if cap is None else cap * jnp.tanh(logits / cap)
  return jnp.sum(weights_BL * optax.softmax_cross_entropy_with_integer_labels(logits, labels_BL))


def check(values, **options):
  hidden, table, *rest = values
  grads = lambda loss: jax.jit(jax.value_and_grad(lambda h, t: 3 * loss(h, t), argnums=(0, 1)))(hidden, table)
  found = grads(lambda h, t: weighted_nll(h, t, *rest, **options))
  expected = grads(lambda h, t: plain(h, t, *rest, cap=options.get('cap')))
  without_gradient = weighted_nll(hidden, table, *rest, **options)
  np.testing.assert_allclose(3 * without_gradient, expected[0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3)), found, expected)


@pytest.mark.parametrize('block', [1, 5, 8, 24, 100])
@pytest.mark.parametrize('cap', [None, 2.0])
def test_blocks_give_the_loss_and_gradient_of_all_at_once(block, cap):
  check(inputs(), block=block, cap=cap)


@pytest.mark.parametrize('targets', [0.0, 0.05, 1.0])
def test_no_few_and_all_positions_are_targets(targets):
  check(inputs(targets=targets), block=5)


def test_what_has_no_weight_is_not_read():
  hidden, table, labels, weights = inputs()
  expected = weighted_nll(hidden, table, labels, weights, block=5)
  hidden[weights == 0], labels[weights == 0] = np.nan, 10**6
  assert weighted_nll(hidden, table, labels, weights, block=5) == expected
  grads = jax.grad(weighted_nll, argnums=(0, 1))(hidden, table, labels, weights, block=5)
  assert all(np.isfinite(grad).all() for grad in grads) and not grads[0][weights == 0].any()


def test_as_many_blocks_run_as_the_targets_fill(monkeypatch):
  ran = []
  monkeypatch.setattr(head, 'softcap', lambda x, cap: (jax.debug.callback(lambda: ran.append(1)), x)[1])
  for targets, block in ((0.0, 5), (0.5, 5), (1.0, 5), (1.0, 24)):
    values = inputs(targets=targets)
    ran.clear()
    jax.block_until_ready(weighted_nll(*values, block=block))
    jax.effects_barrier()
    assert len(ran) == -(-int((values[3] > 0).sum()) // block)


def test_a_block_that_is_left_out_is_noticed(monkeypatch):
  monkeypatch.setattr(jax.lax, 'fori_loop', lambda low, high, body, carry, plain=jax.lax.fori_loop: plain(
      low, high - 1, body, carry))
  with pytest.raises(AssertionError):
    check(inputs(), block=5)


def test_a_gradient_that_forgets_the_weights_is_noticed(monkeypatch):
  plain_exp = jnp.exp
  monkeypatch.setattr(jnp, 'exp', lambda x: plain_exp(x) + 0.01)
  with pytest.raises(AssertionError):
    check(inputs(), block=5)


def test_bfloat16_states_have_float32_logits():
  hidden, table, labels, weights = inputs()
  half = jnp.asarray(hidden, jnp.bfloat16)
  found, grads = jax.value_and_grad(weighted_nll, argnums=(0, 1))(half, jnp.asarray(table), labels, weights, block=5)
  assert found.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
  np.testing.assert_allclose(found, plain(hidden, table, labels, weights), rtol=1e-2)
