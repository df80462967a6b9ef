"""The TPU's attention kernels, interpreted, are the packed attention of other devices, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from calrec_jax.models import splash_attention
from calrec_jax.models.attention import causal_mask, near
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.packed_attention import attend
from calrec_jax.training import partitioning
from calrec_jax.training.partitioning import MeshShape

SCALE = 0.4


def inputs(B=2, L=150, H=4, G=2, K=8):
  """Queries, keys, values, segments (0 is padding) and a direction to differentiate along."""
  rng = np.random.default_rng(0)
  q_BLHK, k_BLGK, v_BLGK, along_BLHK = (
      jnp.asarray(rng.normal(size=(B, L, n, K)) * 2, jnp.float32) for n in (H, G, G, H))
  segments_BL = np.stack([np.repeat([1, 2, 3, 0], [60, 50, L - 118, 8]), np.repeat([1, 2], [7, L - 7])])[:B]
  return (q_BLHK, k_BLGK, v_BLGK), jnp.asarray(segments_BL, jnp.int32), along_BLHK


def value_and_slopes(attention, qkv, along):
  out, pull = jax.vjp(jax.jit(attention), *qkv)
  return out, pull(along)


def agree(found, expected):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max()), found, expected)


def check(qkv, segments, along, *, cap=None, window=None, longest=None):
  positions = jnp.arange(segments.shape[1])[None]
  seen = near(positions[:, None, :] - positions[:, :, None], window, None if window is None else jnp.asarray(True))
  splash = lambda *x: splash_attention.attend(
      *x, segments, scale=SCALE, cap=cap, window=window, longest=longest, interpret=True)
  packed = lambda *x: attend(*x, causal_mask(segments) & seen, scale=SCALE, cap=cap)
  agree(value_and_slopes(splash, qkv, along), value_and_slopes(packed, qkv, along))


@pytest.mark.parametrize('options', [{}, {'cap': 1.5, 'window': 9}, {'longest': 143}])
def test_kernels_are_packed_attention(options):
  check(*inputs(), **options)


def test_one_key_value_head_and_many_blocks(monkeypatch):
  monkeypatch.setattr(splash_attention, 'LARGEST_BLOCK', 128)
  check(*inputs(L=300, G=1), longest=293)


def test_a_segment_that_is_longer_than_promised_is_noticed():
  with pytest.raises(AssertionError):
    check(*inputs(), longest=100)


def test_segments_that_see_each_other_are_noticed():
  qkv, segments, along = inputs()
  with pytest.raises(AssertionError):
    whole = lambda *x: splash_attention.attend(*x, jnp.ones_like(segments), scale=SCALE, interpret=True)
    packed = lambda *x: attend(*x, causal_mask(segments), scale=SCALE)
    agree(value_and_slopes(whole, qkv, along), value_and_slopes(packed, qkv, along))


# Local and global layers, capped scores; four query heads, two key-value heads: both, or only the first, divide over `model`.
@pytest.mark.parametrize('mesh', [MeshShape(data=4, model=2), MeshShape(data=2, model=4)])
def test_a_decoder_has_the_same_states_and_gradients_on_any_mesh(mesh):
  config = dataclasses.replace(tiny.DECODER, vocab_size=64, n_heads=4, n_kv_heads=2, layer_pattern='LG', window=5,
                               attention_softcap=3.0, attention='packed')
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 64, (4, 24)), jnp.int32)
  segments = jnp.asarray(np.sort(rng.integers(1, 4, (4, 24)), axis=1), jnp.int32)
  positions = jnp.asarray([[(row[:i] == row[i]).sum() for i in range(24)] for row in np.asarray(segments)], jnp.int32)
  params = Decoder(config).init(jax.random.key(0), tokens, segments, positions)['params']

  def loss(params, config):
    states = Decoder(config).apply({'params': params}, tokens, segments, positions)
    return jnp.sum(jnp.sin(states)), states
  def run(config):
    return jax.jit(jax.grad(lambda params: loss(params, config), has_aux=True))(params)
  packed = run(config)
  with partitioning.on_mesh(mesh.build()):
    splash = run(dataclasses.replace(config, attention='interpreted'))
  agree(splash, packed)
