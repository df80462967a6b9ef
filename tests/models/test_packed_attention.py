"""Attention in blocks, keys first, is plain attention, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.models import packed_attention
from calrec_jax.models.attention import causal_mask
from calrec_jax.models.packed_attention import attend

SCALE = 0.4


def inputs(B=2, L=11, H=6, G=2, K=4, seed=0):
  """Queries, keys, values, the mask of packed rows, and a direction to differentiate along."""
  rng = np.random.default_rng(seed)
  q_BLHK, k_BLGK, v_BLGK, along_BLHK = (
      jnp.asarray(rng.normal(size=(B, L, n, K)) * 2, jnp.float32) for n in (H, G, G, H))
  return q_BLHK, k_BLGK, v_BLGK, causal_mask(jnp.asarray(np.sort(rng.integers(0, 3, (B, L)), axis=1))), along_BLHK


def plain(q_BLHK, k_BLGK, v_BLGK, mask_BSL, *, scale, cap=None):
  """Grouped queries as repeated heads, queries first, scores as they are."""
  repeat = functools.partial(jnp.repeat, repeats=q_BLHK.shape[2] // k_BLGK.shape[2], axis=2)
  scores_BHLS = jnp.einsum('blhk,bshk->bhls', q_BLHK, repeat(k_BLGK)) * scale
  scores_BHLS = scores_BHLS if cap is None else cap * jnp.tanh(scores_BHLS / cap)
  weights_BHLS = jax.nn.softmax(jnp.where(mask_BSL.swapaxes(1, 2)[:, None], scores_BHLS, -jnp.inf))
  return jnp.einsum('bhls,bshk->blhk', weights_BHLS, repeat(v_BLGK))


def check(values, cap=None):
  *qkv, mask, along = values
  def value_and_slopes(attention):
    out, pull = jax.vjp(jax.jit(lambda *x: attention(*x, mask, scale=SCALE, cap=cap)), *qkv)
    return out, pull(along)
  jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max()),
               value_and_slopes(attend), value_and_slopes(plain))


@pytest.mark.parametrize('block', [1, 4, 11, 128])
@pytest.mark.parametrize('cap', [None, 1.5])
def test_blocks_are_plain_attention(monkeypatch, block, cap):
  monkeypatch.setattr(packed_attention, 'QUERY_BLOCK', block)
  check(inputs(), cap)


@pytest.mark.parametrize('H, G', [(1, 1), (4, 4), (4, 1)])
def test_groups_of_every_size(H, G):
  check(inputs(H=H, G=G))


def test_a_sequence_longer_than_a_block():
  check(inputs(B=1, L=packed_attention.QUERY_BLOCK + 37))


def test_keys_that_a_block_leaves_out_are_noticed(monkeypatch):
  blocks = packed_attention._blocks
  monkeypatch.setattr(packed_attention, 'QUERY_BLOCK', 4)
  monkeypatch.setattr(packed_attention, '_blocks', lambda length: (
      (queries, slice(0, max(keys.stop - 1, 1))) for queries, keys in blocks(length)))
  with pytest.raises(AssertionError):
    check(inputs())


def test_heads_of_the_wrong_group_are_noticed(monkeypatch):
  def by_rank(x_BLHK, G):
    B, L, H, K = x_BLHK.shape
    return x_BLHK.reshape(B, L, H // G, G, K).transpose(0, 3, 4, 2, 1)
  monkeypatch.setattr(packed_attention, '_queries', by_rank)
  with pytest.raises(AssertionError):
    check(inputs())


def test_bfloat16_has_float32_softmax():
  *qkv, mask, _ = inputs(L=64)
  half = [x.astype(jnp.bfloat16) for x in qkv]
  out = attend(*half, mask, scale=SCALE)
  expected = plain(*(x.astype(jnp.float32) for x in half), mask, scale=SCALE)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())
