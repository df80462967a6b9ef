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


def plain(q_BLHK, k_BLGK, v_BLGK, mask_BSL, *, scale, cap=None, longest=None):
  """Grouped queries as repeated heads, queries first, scores as they are."""
  repeat = functools.partial(jnp.repeat, repeats=q_BLHK.shape[2] // k_BLGK.shape[2], axis=2)
  scores_BHLS = jnp.einsum('blhk,bshk->bhls', q_BLHK, repeat(k_BLGK)) * scale
  scores_BHLS = scores_BHLS if cap is None else cap * jnp.tanh(scores_BHLS / cap)
  weights_BHLS = jax.nn.softmax(jnp.where(mask_BSL.swapaxes(1, 2)[:, None], scores_BHLS, -jnp.inf))
  return jnp.einsum('bhls,bshk->blhk', weights_BHLS, repeat(v_BLGK))


def check(values, cap=None, longest=None):
  *qkv, mask, along = values
  def value_and_slopes(attention):
    out, pull = jax.vjp(jax.jit(lambda *x: attention(*x, mask, scale=SCALE, cap=cap, longest=longest)), *qkv)
    return out, pull(along)
  jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max()),
               value_and_slopes(attend), value_and_slopes(plain))


@pytest.mark.parametrize('block', [1, 4, 11, 128])
@pytest.mark.parametrize('cap', [None, 1.5])
def test_blocks_are_plain_attention(monkeypatch, block, cap):
  monkeypatch.setattr(packed_attention, 'LEAST_QUERIES', block)
  check(inputs(), cap)


@pytest.mark.parametrize('H, G', [(1, 1), (4, 4), (4, 1)])
def test_groups_of_every_size(H, G):
  check(inputs(H=H, G=G))


def test_a_sequence_longer_than_a_block():
  check(inputs(B=1, L=packed_attention.LEAST_QUERIES + 37))


@pytest.mark.parametrize('length, longest, blocks', [
    (64, None, 1), (512, None, 8), (4096, None, 8), (1024, 512, 16), (552, 65, 9)])
def test_a_longer_segment_has_no_more_blocks(length, longest, blocks):
  cut = list(packed_attention._blocks(length, longest))
  assert len(cut) == blocks
  assert [queries.start for queries, _ in cut] == [0, *(queries.stop for queries, _ in cut[:-1])] and cut[-1][0].stop == length


def segments_of(*lengths):
  """The inputs of one row of segments of so many tokens."""
  *qkv, _, along = inputs(B=1, L=sum(lengths))
  return *qkv, causal_mask(jnp.asarray([np.repeat(np.arange(len(lengths)) + 1, lengths)])), along


@pytest.mark.parametrize('block', [1, 3, 4])
def test_keys_further_back_than_the_longest_segment_are_left_out(monkeypatch, block):
  monkeypatch.setattr(packed_attention, 'LEAST_QUERIES', block)
  check(segments_of(5, 2, 4, 5), longest=5)
  read = [keys.stop - keys.start for _, keys in packed_attention._blocks(16, 5)]
  assert max(read) <= 5 + 2 * (block - 1) and sum(read) < sum(keys.stop for _, keys in packed_attention._blocks(16, None))


def test_a_segment_that_is_longer_than_promised_is_noticed(monkeypatch):
  monkeypatch.setattr(packed_attention, 'LEAST_QUERIES', 1)
  with pytest.raises(AssertionError):
    check(segments_of(5, 2, 6, 3), longest=5)


def test_keys_that_a_block_leaves_out_are_noticed(monkeypatch):
  blocks = packed_attention._blocks
  monkeypatch.setattr(packed_attention, 'LEAST_QUERIES', 4)
  monkeypatch.setattr(packed_attention, '_blocks', lambda *of: (
      (queries, slice(0, max(keys.stop - 1, 1))) for queries, keys in blocks(*of)))
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
