"""Grouped-query attention over packed sequences: exact, a block of queries at a time, without scores kept for the gradient.

A block of queries reads the keys up to its end only, and none that lie further back than a segment is long: of a long sequence
many scores are never computed. The backward pass computes a block's scores anew (Dao et al. 2022). Scores lie keys first: on
CPU no product needs an operand laid out anew, and softmax runs over the first axis: both several times as fast as queries
first.

Axes: B rows, L length, H heads, G key-value heads, R = H / G, K head dim; S keys and C queries of a block.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from calrec_jax.models.layers import softcap

BLOCKS = 8  # into which the longest segment is cut: more waste fewer scores, and take longer to compile
LEAST_QUERIES = 64  # of a block


def attend(q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, mask_BSL: jax.Array, *, scale: float,
           cap: float | None = None, longest: int | None = None) -> jax.Array:
  """Causal attention of a whole sequence, [B, L, H, K]; softmax in float32.

  Args:
    q_BLHK: queries.
    k_BLGK, v_BLGK: keys and values.
    mask_BSL: bool, whether a key (second axis) is seen by a query (last axis), which is not before it. Each query sees one.
    scale: multiplies the scores.
    cap: soft cap of the scores, or None.
    longest: a promise that no query sees a key so many places before it, or None.
  """
  return _attend(scale, cap, longest, q_BLHK, k_BLGK, v_BLGK, mask_BSL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, cap, longest, q_BLHK, k_BLGK, v_BLGK, mask_BSL):
  return _forward(scale, cap, longest, q_BLHK, k_BLGK, v_BLGK, mask_BSL)[0]


def _forward(scale, cap, longest, q_BLHK, k_BLGK, v_BLGK, mask_BSL):
  q_BGKRL, k_BGLK, v_BGKL = _queries(q_BLHK, k_BLGK.shape[2]), k_BLGK.transpose(0, 2, 1, 3), v_BLGK.transpose(0, 2, 3, 1)
  outs, norms = [], []
  for block, keys in _blocks(q_BLHK.shape[1], longest):
    scores_BGSRC = _scores(q_BGKRL[..., block], k_BGLK[:, :, keys], mask_BSL[:, keys, block], scale, cap)
    highest_BGRC = jnp.max(scores_BGSRC, axis=2)
    weights_BGSRC = jnp.exp(scores_BGSRC - highest_BGRC[:, :, None])
    sum_BGRC = jnp.sum(weights_BGSRC, axis=2)
    outs.append(einsum32('bgks,bgsrc->bgkrc', v_BGKL[..., keys], weights_BGSRC) / sum_BGRC[:, :, None])
    norms.append(highest_BGRC + jnp.log(sum_BGRC))
  out_BLHK = checkpoint_name(_heads_last(jnp.concatenate(outs, axis=-1)).astype(q_BLHK.dtype), 'attention')
  norm_BGRL = checkpoint_name(jnp.concatenate(norms, axis=-1), 'attention')
  return out_BLHK, (q_BLHK, k_BLGK, v_BLGK, mask_BSL, out_BLHK, norm_BGRL)


def _backward(scale, cap, longest, kept, slope_BLHK):
  q_BLHK, k_BLGK, v_BLGK, mask_BSL, out_BLHK, norm_BGRL = kept
  q_BGKRL, slope_BGKRL, out_BGKRL = (_queries(x, k_BLGK.shape[2]) for x in (q_BLHK, slope_BLHK, out_BLHK))
  # What is subtracted from a query's slopes, so that its weights go on adding up to 1.
  mean_BGRL = jnp.sum(slope_BGKRL.astype(jnp.float32) * out_BGKRL.astype(jnp.float32), axis=2)
  k_BGLK, v_BGLK, k_BGKL = k_BLGK.transpose(0, 2, 1, 3), v_BLGK.transpose(0, 2, 1, 3), k_BLGK.transpose(0, 2, 3, 1)
  of_q, of_k_BGLK, of_v_BGLK = [], jnp.zeros(k_BGLK.shape, jnp.float32), jnp.zeros(k_BGLK.shape, jnp.float32)
  flat = lambda x_BGKRC: x_BGKRC.reshape(*x_BGKRC.shape[:3], -1)  # with two axes to sum over XLA lays both operands out anew
  for block, keys in _blocks(q_BLHK.shape[1], longest):
    q_BGKRC, slope_BGKRC = q_BGKRL[..., block], slope_BGKRL[..., block]
    scores_BGSRC = _scores(q_BGKRC, k_BGLK[:, :, keys], mask_BSL[:, keys, block], scale, cap)
    weights_BGSRC = jnp.exp(scores_BGSRC - norm_BGRL[:, :, None, :, block])
    of_weights_BGSRC = einsum32('bgsk,bgkrc->bgsrc', v_BGLK[:, :, keys], slope_BGKRC)
    of_scores_BGSRC = scale * weights_BGSRC * (of_weights_BGSRC - mean_BGRL[:, :, None, :, block])
    if cap is not None:
      of_scores_BGSRC *= jnp.where(weights_BGSRC > 0, 1 - jnp.square(scores_BGSRC / cap), 0.0)  # scores of -inf have none
    of_q.append(einsum32('bgks,bgsrc->bgkrc', k_BGKL[..., keys], of_scores_BGSRC))
    of_v_BGLK = of_v_BGLK.at[:, :, keys].add(einsum32('bgsn,bgkn->bgsk', flat(weights_BGSRC), flat(slope_BGKRC)))
    of_k_BGLK = of_k_BGLK.at[:, :, keys].add(einsum32('bgsn,bgkn->bgsk', flat(of_scores_BGSRC), flat(q_BGKRC)))
  back = lambda x_BGLK: x_BGLK.transpose(0, 2, 1, 3).astype(k_BLGK.dtype)
  return _heads_last(jnp.concatenate(of_q, axis=-1)).astype(q_BLHK.dtype), back(of_k_BGLK), back(of_v_BGLK), None


_attend.defvjp(_forward, _backward)


def _blocks(length: int, longest: int | None) -> Iterator[tuple[slice, slice]]:
  """(queries, the keys that they may see) of each block."""
  longest = length if longest is None else min(length, longest)
  size = math.ceil(longest / BLOCKS / LEAST_QUERIES) * LEAST_QUERIES
  for start in range(0, length, size):
    stop, first = min(start + size, length), max(0, start - longest + 1)
    yield slice(start, stop), slice(first // LEAST_QUERIES * LEAST_QUERIES, stop)


def _queries(x_BLHK: jax.Array, G: int) -> jax.Array:
  """[B, G, K, R, L]: a group's heads side by side."""
  B, L, H, K = x_BLHK.shape
  return x_BLHK.reshape(B, L, G, H // G, K).transpose(0, 2, 4, 3, 1)


def _heads_last(x_BGKRL: jax.Array) -> jax.Array:
  """[B, L, H, K]."""
  B, G, K, R, L = x_BGKRL.shape
  return x_BGKRL.transpose(0, 4, 1, 3, 2).reshape(B, L, G * R, K)


def einsum32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """A product in float32, of operands that have the dtype of the narrower one."""
  dtype = x.dtype if x.dtype.itemsize < y.dtype.itemsize else y.dtype
  return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)


def _scores(q_BGKRC: jax.Array, k_BGSK: jax.Array, mask_BSC: jax.Array, scale: float, cap: float | None) -> jax.Array:
  """Scaled, capped and masked scores, float32 [B, G, S, R, C]."""
  scores_BGSRC = softcap(scale * einsum32('bgsk,bgkrc->bgsrc', k_BGSK, q_BGKRC), cap)
  return jnp.where(mask_BSC[:, None, :, None], scores_BGSRC, -jnp.inf)
