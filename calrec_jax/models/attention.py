"""Grouped-query attention: over a whole packed sequence, or of new tokens against caches.

Axes: B rows, L length, D embed, H heads, G key-value heads, R = H / G, K head dim; in decoding U users, W branches of each at
most (B in all, L = S new tokens of each), P prefix length, T suffix length, X = W · S · R and Y = S · R rows.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from calrec_jax.models import splash_attention
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.layers import Projection, RMSNorm, softcap
from calrec_jax.models.packed_attention import attend, einsum32
from calrec_jax.models.rope import Rotation


@flax.struct.dataclass
class Cache:
  """Keys (rotated) and values of one layer.

  As a sequence is read they are [B, L, G, K]; of prefixes [U, G, P, K] and of suffixes [B, G, T, K], which the products of a
  step read without laying them out anew.
  """

  keys: jax.Array
  values: jax.Array

  def heads_first(self) -> 'Cache':
    """The cache of a sequence, laid out as a prefix or suffix."""
    return jax.tree.map(lambda x_BLGK: x_BLGK.swapaxes(1, 2), self)


@flax.struct.dataclass
class Whole:
  """Where a whole sequence attends."""

  positions: jax.Array  # int32 [B, L]
  segments: jax.Array  # int32 [B, L]; tokens of one segment see each other
  mask: jax.Array | None  # bool [B, S, L], keys first: whether a key is seen by a query; None: splash attention needs none
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


def whole(config: DecoderConfig, positions_BL: jax.Array, segments_BL: jax.Array, longest: int | None = None) -> Whole:
  """Where sequences attend: within segments, causally."""
  return Whole(positions_BL, segments_BL, None if config.splash else causal_mask(segments_BL), longest)


def attend_whole(q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, where: Whole, config: DecoderConfig,
                 local: jax.Array | None) -> jax.Array:
  """Attention of whole sequences, [B, L, H, K]."""
  options = {'scale': config.attention_scale, 'cap': config.attention_softcap, 'longest': where.longest}
  if not config.splash:
    back_BSL = where.positions[:, None, :] - where.positions[:, :, None]
    return attend(q_BLHK, k_BLGK, v_BLGK, where.mask & near(back_BSL, config.window, local), **options)
  def splash(window: int | None) -> Callable[..., jax.Array]:
    return functools.partial(splash_attention.attend, window=window, interpret=config.attention == 'interpreted', **options)
  operands = q_BLHK, k_BLGK, v_BLGK, where.segments
  return splash(None)(*operands) if local is None else jax.lax.cond(local, splash(config.window), splash(None), *operands)


def near(distance: jax.Array, window: int | None, local: jax.Array | None) -> jax.Array | bool:
  """Whether a key so many tokens back is inside the window; always, where the layer is not `local` (bool [], or None)."""
  return True if local is None else (distance < window) | ~local


def attend_step(q_BSHK: jax.Array, prefix: Cache, suffix: Cache, step: Step, config: DecoderConfig,
                local: jax.Array | None) -> jax.Array:
  """Attention of new tokens to the one prefix of their user and to their branch's suffix, [B, S, H, K].

  The two softmaxes become one by their maxima and sums.
  """
  (B, G, T, K), (U, _, P, _), W, S = suffix.keys.shape, prefix.keys.shape, step.branches.shape[1], q_BSHK.shape[1]
  q_BGYK = (q_BSHK * config.attention_scale).reshape(B, S, G, -1, K).swapaxes(1, 2).reshape(B, G, -1, K)
  R = q_BGYK.shape[2] // S
  # By branch [B, G, S · R, ...] to by user [U, G, W · S · R, ...], and back.
  by_user = lambda x_BGYC: x_BGYC[step.branches].swapaxes(1, 2).reshape(U, x_BGYC.shape[1], W * S * R, -1)
  by_branch = lambda x_UGXC: x_UGXC.reshape(U, G, W, S * R, -1).swapaxes(1, 2).reshape(U * W, G, S * R, -1)[step.places]

  def part(q_CGYK: jax.Array, cache: Cache, seen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The maximum of the scores, the sum of their exponentials and of the values by these."""
    scores_CGYN = softcap(einsum32('cgyk,cgnk->cgyn', q_CGYK, cache.keys), config.attention_softcap)
    scores_CGYN = jnp.where(seen, scores_CGYN, -jnp.inf)
    # In a window that has passed the prefix all are -inf; the bound makes their exponentials 0.
    highest_CGY1 = jnp.max(scores_CGYN, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    weights_CGYN = jnp.exp(scores_CGYN - highest_CGY1)
    return highest_CGY1, jnp.sum(weights_CGYN, axis=-1, keepdims=True), einsum32('cgyn,cgnk->cgyk', weights_CGYN, cache.values)

  rows = lambda x_BS: jnp.repeat(x_BS, R, axis=-1)[:, None, :, None]  # one for each head of a group
  back_U1XP = by_user(rows(step.positions)) - jnp.arange(P)[None, None, None]
  seen_U1XP = step.prefix_mask[:, None, None] & near(back_U1XP, config.window, local)
  back_11YT = rows(step.index + jnp.arange(S)[None]) - jnp.arange(T)[None, None, None]
  seen_11YT = (back_11YT >= 0) & near(back_11YT, config.window, local)
  of_prefix = [by_branch(x_UGXC) for x_UGXC in part(by_user(q_BGYK), prefix, seen_U1XP)]
  of_suffix = part(q_BGYK, suffix, seen_11YT)
  highest_BGY1 = jnp.maximum(of_prefix[0], of_suffix[0])
  sum_BGY1, out_BGYK = (sum(x[n] * jnp.exp(x[0] - highest_BGY1) for x in (of_prefix, of_suffix)) for n in (1, 2))
  out_BGYK = (out_BGYK / sum_BGY1).astype(q_BSHK.dtype)
  return out_BGYK.reshape(B, G, S, R, K).swapaxes(1, 2).reshape(q_BSHK.shape)


def write_suffix(suffix: Cache, keys_BSGK: jax.Array, values_BSGK: jax.Array, index: jax.Array) -> Cache:
  """The suffixes with S more tokens, from `index` on."""
  new = Cache(keys_BSGK, values_BSGK).heads_first()
  return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=2), suffix, new)


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
      attended_BLHK = attend_whole(q_BLHK, k_BLGK, v_BLGK, where, c, local)
    else:
      prefix, suffix = caches
      cache = write_suffix(suffix, k_BLGK, v_BLGK, where.index)
      attended_BLHK = attend_step(q_BLHK, prefix, cache, where, c, local)
    out = Projection(c, (c.n_heads, c.head_dim), D, ('heads', 'kv'), ('embed',), c.out_bias, name='out')
    return out(attended_BLHK), cache
