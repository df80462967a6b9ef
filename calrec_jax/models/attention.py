"""Grouped-query attention: over a whole packed sequence, or of one new token against caches.

Axes: B rows, L length, D embed, H heads, G key-value heads, R = H / G, K head dim; in decoding U users, N samples of each,
P prefix length, T suffix length.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.layers import Projection, RMSNorm, softcap
from calrec_jax.models.packed_attention import attend
from calrec_jax.models.rope import Rotation


@flax.struct.dataclass
class Cache:
  """Keys (rotated) and values of one layer, or of all layers with a leading axis."""

  keys: jax.Array
  values: jax.Array


@flax.struct.dataclass
class Whole:
  """Where a whole sequence attends."""

  positions: jax.Array  # int32 [B, L]
  mask: jax.Array  # bool [B, S, L], keys first: whether a key is seen by a query
  longest: int | None = flax.struct.field(pytree_node=False, default=None)  # no segment has more tokens; None: unknown


@flax.struct.dataclass
class Step:
  """Where one new token of each sample attends: its user's prefix, and its own suffix up to and with `index`."""

  positions: jax.Array  # int32 [U, N]
  prefix_mask: jax.Array  # bool [U, P], of the positions 0, 1, …
  index: jax.Array  # int32 [], where in the suffix the new token is


def causal_mask(segments_BL: jax.Array) -> jax.Array:
  """bool [B, S, L]: key s is seen by query l if s <= l and both are of one segment. Padding (segment 0) sees padding only."""
  same_BSL = segments_BL[:, :, None] == segments_BL[:, None, :]
  return jnp.triu(same_BSL)


def near(distance: jax.Array, window: int | None, local: jax.Array | None) -> jax.Array | bool:
  """Whether a key so many tokens back is inside the window; always, where the layer is not `local` (bool [], or None)."""
  return True if local is None else (distance < window) | ~local


def attend_step(q_UNHK: jax.Array, prefix: Cache, suffix: Cache, step: Step, config: DecoderConfig,
                local: jax.Array | None) -> jax.Array:
  """Attention of N new tokens a user to the one prefix [U, P, G, K] and to each one's suffix [U, N, T, G, K]."""
  U, N, H, K = q_UNHK.shape
  G, T, P = prefix.keys.shape[2], suffix.keys.shape[2], prefix.keys.shape[1]
  q_UNGRK = q_UNHK.reshape(U, N, G, H // G, K) * config.attention_scale
  prefix_UNGRP = jnp.einsum('ungrk,upgk->ungrp', q_UNGRK, prefix.keys, preferred_element_type=jnp.float32)
  suffix_UNGRT = jnp.einsum('ungrk,untgk->ungrt', q_UNGRK, suffix.keys, preferred_element_type=jnp.float32)
  back_UNP = step.positions[..., None] - jnp.arange(P)[None, None, :]
  prefix_mask_UNP = step.prefix_mask[:, None, :] & near(back_UNP, config.window, local)
  back_T = step.index - jnp.arange(T)
  suffix_mask_T = (back_T >= 0) & near(back_T, config.window, local)
  cap = config.attention_softcap
  scores = jnp.concatenate([
      jnp.where(prefix_mask_UNP[:, :, None, None, :], softcap(prefix_UNGRP, cap), -jnp.inf),
      jnp.where(suffix_mask_T[None, None, None, None, :], softcap(suffix_UNGRT, cap), -jnp.inf)], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1).astype(q_UNHK.dtype)
  out_UNGRK = (jnp.einsum('ungrp,upgk->ungrk', weights[..., :P], prefix.values)
               + jnp.einsum('ungrt,untgk->ungrk', weights[..., P:], suffix.values))
  return out_UNGRK.reshape(U, N, H, K)


class Attention(nn.Module):
  """Grouped-query attention over a whole sequence, or of one step against caches."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, caches: tuple[Cache, Cache] | None, local: jax.Array | None, where: Whole | Step,
               rotation: Rotation) -> tuple[jax.Array, Cache]:
    c, D = self.config, (x_BLD.shape[-1],)
    def heads(name: str, number: int, axis: str) -> jax.Array:
      return Projection(c, D, (number, c.head_dim), ('embed',), (axis, 'kv'), c.qkv_bias, name=name)(x_BLD)
    q_BLHK, k_BLGK = heads('query', c.n_heads, 'heads'), heads('key', c.n_kv_heads, 'kv_heads')
    v_BLGK = heads('value', c.n_kv_heads, 'kv_heads')
    if c.qk_norm:
      q_BLHK, k_BLGK = RMSNorm(c, name='query_norm')(q_BLHK), RMSNorm(c, name='key_norm')(k_BLGK)
    q_BLHK, k_BLGK = rotation.rotate(q_BLHK, local), rotation.rotate(k_BLGK, local)
    if caches is None:
      cache = Cache(k_BLGK, v_BLGK)
      back_BSL = where.positions[:, None, :] - where.positions[:, :, None]
      attended_BLHK = attend(q_BLHK, k_BLGK, v_BLGK, where.mask & near(back_BSL, c.window, local),
                             scale=c.attention_scale, cap=c.attention_softcap, longest=where.longest)
    else:
      prefix, suffix = caches
      cache = Cache(suffix.keys.at[:, :, where.index].set(k_BLGK), suffix.values.at[:, :, where.index].set(v_BLGK))
      attended_BLHK = attend_step(q_BLHK, prefix, cache, where, c, local)
    out = Projection(c, (c.n_heads, c.head_dim), D, ('heads', 'kv'), ('embed',), c.out_bias, name='out')
    return out(attended_BLHK), cache
