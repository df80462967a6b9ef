"""The network of SASRec: a causal Transformer over items (Kang & McAuley 2018, section III).

Axes: B rows, L positions, D embed, H heads, K head dim, I items. A row holds the histories of one user or of several, one after
the other; `segments_BL` tells them apart (1, 2, ...; 0 is padding), and attention does not cross them. So nothing depends on
which histories share a row, or on where in it they lie.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
  """x + dropout(attention(norm(x))), then x + dropout(feed_forward(norm(x))): sections III-B and III-C."""

  heads: int
  dropout: float

  @nn.compact
  def __call__(self, x_BLD: jax.Array, seen_BLL: jax.Array, deterministic: bool) -> jax.Array:
    D = x_BLD.shape[-1]
    drop = functools.partial(nn.Dropout(self.dropout), deterministic=deterministic)
    y_BLD = nn.LayerNorm(name='attention_norm')(x_BLD)
    project = functools.partial(nn.DenseGeneral, (self.heads, D // self.heads))
    q_BLHK, k_BLHK, v_BLHK = (project(name=name)(y_BLD) for name in ('query', 'key', 'value'))
    scores_BHLL = jnp.einsum('blhk,bmhk->bhlm', q_BLHK, k_BLHK) * (D // self.heads)**-0.5
    scores_BHLL = jnp.where(seen_BLL[:, None], scores_BHLL, jnp.finfo(jnp.float32).min)
    weights_BHLL = drop(nn.softmax(scores_BHLL))
    y_BLHK = jnp.einsum('bhlm,bmhk->blhk', weights_BHLL, v_BLHK)
    x_BLD += drop(nn.DenseGeneral(D, axis=(-2, -1), name='out')(y_BLHK))
    y_BLD = nn.LayerNorm(name='feed_forward_norm')(x_BLD)
    y_BLD = drop(nn.relu(nn.Dense(D, name='up')(y_BLD)))  # as wide as the embedding, as in the paper
    return x_BLD + drop(nn.Dense(D, name='down')(y_BLD))


class Sasrec(nn.Module):
  """From packed histories to a vector at each position, whose product with an item's embedding is the item's logit."""

  n_items: int
  max_length: int
  dim: int
  layers: int
  heads: int
  dropout: float

  def setup(self):
    init = nn.initializers.normal(0.02)
    self.item_ID = self.param('items', init, (self.n_items, self.dim))
    self.position_LD = self.param('positions', init, (self.max_length, self.dim))
    self.blocks = [Block(self.heads, self.dropout) for _ in range(self.layers)]
    self.norm = nn.LayerNorm()
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, items_BL: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array, *,
               deterministic: bool = True) -> jax.Array:
    """float32 [B, L, D]; finite, and without meaning, where a row is padded.

    Args:
      items_BL: int32, item indices; any where a row is padded.
      segments_BL: int32, the number of the history in its row; 0 pads.
      positions_BL: int32, places in the history, from 0.
      deterministic: whether dropout is off; if not, an rng named `dropout` is needed.
    """
    item_BLD = self.item_ID[items_BL] * self.dim**0.5  # not in the paper, but in its authors' code
    x_BLD = self.drop(item_BLD + self.position_LD[positions_BL], deterministic=deterministic)
    seen_BLL = causal_mask(segments_BL)
    for block in self.blocks:
      x_BLD = block(x_BLD, seen_BLL, deterministic)
    return self.norm(x_BLD)


def causal_mask(segments_BL: jax.Array) -> jax.Array:
  """bool [B, L, L]: whether the query position (first) sees the key position: not later, and of the same history."""
  return jnp.tril(segments_BL[:, :, None] == segments_BL[:, None, :])


def mean_nll(logits_NI: jax.Array, labels_N: jax.Array, real_N: jax.Array) -> jax.Array:
  """float32 []: the cross-entropy of the labels over all items, in nats, its mean over the real positions; 0 if none is.

  Args:
    logits_NI: float32.
    labels_N: int32, item indices; any where a position is not real.
    real_N: bool.
  """
  label_logit_N = jnp.take_along_axis(logits_NI, labels_N[:, None], axis=-1)[:, 0]
  nll_N = jax.nn.logsumexp(logits_NI, axis=-1) - label_logit_N
  return jnp.where(real_N, nll_N, 0).sum() / jnp.maximum(real_N.sum(), 1)
