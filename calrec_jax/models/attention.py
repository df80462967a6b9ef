"""Grouped-query attention: over a whole packed sequence, or of new tokens against caches.

Axes: B rows, L length, D embed, H heads, G key-value heads, R = H / G, K head dim; in decoding U users, W branches of each at
most (B in all, L = S new tokens of each), P prefix length, T suffix length, X = W · S · R and Y = S · R columns.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.layers import Projection, RMSNorm, softcap
from calrec_jax.models.packed_attention import attend, einsum32
from calrec_jax.models.rope import Rotation


@flax.struct.dataclass
class Cache:
  """Keys (rotated) and values of one layer.

  As a sequence is read they are [B, L, G, K]. Prefixes have keys [U, G, P, K] and values [U, G, K, P], suffixes keys
  [B, G, T, K] and values [B, G, K, T]: what the products of a step read without laying it out anew.
  """

  keys: jax.Array
  values: jax.Array

  def as_prefix(self) -> 'Cache':
    """The cache of a sequence, laid out as a prefix."""
    return Cache(self.keys.transpose(0, 2, 1, 3), self.values.transpose(0, 2, 3, 1))


@flax.struct.dataclass
class Whole:
  """Where a whole sequence attends."""

  positions: jax.Array  # int32 [B, L]
  mask: jax.Array  # bool [B, S, L], keys first: whether a key is seen by a query
  longest: int | None = flax.struct.field(pytree_node=False, default=None)  # no segment has more tokens; None: unknown


@flax.struct.dataclass
class Step:
  """Where S new tokens of each branch attend: its user's prefix, and its own suffix, in which they stand from `index` on.

  `branches` and `places` say who is whose: as the users' numbers of branches differ, these lie in one row of B.
  """

  positions: jax.Array  # int32 [B, S]
  prefix_mask: jax.Array  # bool [U, P], of the positions 0, 1, …
  index: jax.Array  # int32 []
  branches: jax.Array  # int32 [U, W], the branches of each user; any, where it has fewer
  places: jax.Array  # int32 [B], where in these, flattened, a branch is


def causal_mask(segments_BL: jax.Array) -> jax.Array:
  """bool [B, S, L]: key s is seen by query l if s <= l and both are of one segment. Padding (segment 0) sees padding only."""
  same_BSL = segments_BL[:, :, None] == segments_BL[:, None, :]
  return jnp.triu(same_BSL)


def near(distance: jax.Array, window: int | None, local: jax.Array | None) -> jax.Array | bool:
  """Whether a key so many tokens back is inside the window; always, where the layer is not `local` (bool [], or None)."""
  return True if local is None else (distance < window) | ~local


def attend_step(q_BSHK: jax.Array, prefix: Cache, suffix: Cache, step: Step, config: DecoderConfig,
                local: jax.Array | None) -> jax.Array:
  """Attention of new tokens to the one prefix of their user and to their branch's suffix, [B, S, H, K].

  The two softmaxes become one by their maxima and sums. Scores lie keys first, as in `packed_attention`.
  """
  (B, G, T, K), (U, _, P, _), W, S = suffix.keys.shape, prefix.keys.shape, step.branches.shape[1], q_BSHK.shape[1]
  q_BGKSR = (q_BSHK * config.attention_scale).reshape(B, S, G, -1, K).transpose(0, 2, 4, 1, 3)
  R = q_BGKSR.shape[-1]
  score = lambda equation, keys, q: softcap(einsum32(equation, keys, q), config.attention_softcap)
  columns = lambda x: jnp.repeat(x, R, axis=-1)  # one for each head of a group
  # By branch [B, ...] to by user [U, ..., W · S · R], and back.
  by_user = lambda x_BY: jnp.moveaxis(x_BY[step.branches], 1, -2).reshape(U, *x_BY.shape[1:-1], -1)
  split = lambda x_UX: jnp.moveaxis(x_UX.reshape(*x_UX.shape[:-1], W, -1), -2, 1)
  by_branch = lambda x_UX: split(x_UX).reshape(U * W, *x_UX.shape[1:-1], -1)[step.places]
  q_BGKY = q_BGKSR.reshape(B, G, K, -1)
  prefix_UGPX = score('ugpk,ugkx->ugpx', prefix.keys, by_user(q_BGKY))
  suffix_BGTY = score('bgtk,bgky->bgty', suffix.keys, q_BGKY)
  back_UPX = columns(by_user(step.positions))[:, None] - jnp.arange(P)[None, :, None]
  seen_UPX = step.prefix_mask[:, :, None] & near(back_UPX, config.window, local)
  prefix_UGPX = jnp.where(seen_UPX[:, None], prefix_UGPX, -jnp.inf)
  back_TY = columns(step.index + jnp.arange(S)[None] - jnp.arange(T)[:, None])
  seen_TY = (back_TY >= 0) & near(back_TY, config.window, local)
  suffix_BGTY = jnp.where(seen_TY[None, None], suffix_BGTY, -jnp.inf)
  highest_BGY = jnp.maximum(by_branch(jnp.max(prefix_UGPX, axis=2)), jnp.max(suffix_BGTY, axis=2))
  prefix_UGPX = jnp.exp(prefix_UGPX - by_user(highest_BGY)[:, :, None])
  suffix_BGTY = jnp.exp(suffix_BGTY - highest_BGY[:, :, None])
  sum_BGY = by_branch(jnp.sum(prefix_UGPX, axis=2)) + jnp.sum(suffix_BGTY, axis=2)
  of_prefix_BGKY = by_branch(einsum32('ugkp,ugpx->ugkx', prefix.values, prefix_UGPX))
  out_BGKY = (of_prefix_BGKY + einsum32('bgkt,bgty->bgky', suffix.values, suffix_BGTY)) / sum_BGY[:, :, None]
  return out_BGKY.astype(q_BSHK.dtype).reshape(B, G, K, S, R).transpose(0, 3, 1, 4, 2).reshape(q_BSHK.shape)


def write_suffix(suffix: Cache, keys_BSGK: jax.Array, values_BSGK: jax.Array, index: jax.Array) -> Cache:
  """The suffixes with S more tokens, from `index` on."""
  return Cache(jax.lax.dynamic_update_slice_in_dim(suffix.keys, keys_BSGK.transpose(0, 2, 1, 3), index, axis=2),
               jax.lax.dynamic_update_slice_in_dim(suffix.values, values_BSGK.transpose(0, 2, 3, 1), index, axis=3))


class Attention(nn.Module):
  """Grouped-query attention over a whole sequence, or of a step against caches."""

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
      cache = write_suffix(suffix, k_BLGK, v_BLGK, where.index)
      attended_BLHK = attend_step(q_BLHK, prefix, cache, where, c, local)
    out = Projection(c, (c.n_heads, c.head_dim), D, ('heads', 'kv'), ('embed',), c.out_bias, name='out')
    return out(attended_BLHK), cache
