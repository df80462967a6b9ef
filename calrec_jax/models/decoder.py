"""The decoder: a causal language model, configured and not subclassed (`DecoderConfig` says how).

Layers run under one `nn.scan`, so that compile time does not grow with depth, whatever the pattern of global and local
layers: which kind a layer is goes into the scan as data. Norms, softmax and logits are float32 always.

Axes: B rows, L length, D embed, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from calrec_jax.models.attention import Attention, Cache, Step, Whole, whole
from calrec_jax.models.decoder_config import REMAT_POLICIES, DecoderConfig
from calrec_jax.models.head import weighted_nll
from calrec_jax.models.layers import GatedMlp, RMSNorm, product, softcap
from calrec_jax.models.rope import Rotation, rotation


class Block(nn.Module):
  """One layer. A scan's body: the carry is x; `caches` and `local` are the layer's, the rest is the same for all layers."""

  config: DecoderConfig
  keep_cache: bool = False
  train: bool = False

  @nn.compact
  def __call__(self, x_BLD: jax.Array, caches: tuple[Cache, Cache] | None, local: jax.Array | None, where: Whole | Step,
               turned: Rotation) -> tuple[jax.Array, Cache | None]:
    c = self.config
    drop = nn.Dropout(c.dropout, deterministic=not self.train)
    y_BLD = RMSNorm(c, name='attention_norm')(x_BLD)
    y_BLD, cache = Attention(c, name='attention')(y_BLD, caches, local, where, turned)
    if c.post_norms:
      y_BLD = RMSNorm(c, name='post_attention_norm')(y_BLD)
    x_BLD = x_BLD + drop(y_BLD)
    y_BLD = GatedMlp(c, name='mlp')(RMSNorm(c, name='mlp_norm')(x_BLD))
    if c.post_norms:
      y_BLD = RMSNorm(c, name='post_mlp_norm')(y_BLD)
    x_BLD = x_BLD + drop(y_BLD)
    x_BLD = nn.with_logical_constraint(x_BLD, ('batch', 'length', 'activation_embed'))
    return x_BLD, cache if self.keep_cache else None


class Decoder(nn.Module):
  """Tokens to hidden states, and hidden states to logits. `decoding.py` is the same computation, layer by layer."""

  config: DecoderConfig

  def setup(self):
    c = self.config
    table = nn.with_logical_partitioning(nn.initializers.normal(c.embed_dim**-0.5), ('vocab', 'embed'))
    self.embedding = self.param('embedding', table, (c.vocab_size, c.embed_dim), c.param_dtype)
    if not c.tied_head:
      self.head = self.param('head', table, (c.vocab_size, c.embed_dim), c.param_dtype)
    self.final_norm = RMSNorm(c)

  @nn.compact
  def __call__(self, tokens_BL: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array, *,
               longest: int | None = None, train: bool = False) -> jax.Array:
    """Hidden states [B, L, D] after the final norm. Tokens of one segment see each other, causally, and nothing else.

    `longest`: a promise that no segment has more tokens, which saves time where rows are longer.
    """
    c = self.config
    layers = nn.scan(
        nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False), variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True}, in_axes=(0, 0, nn.broadcast, nn.broadcast), length=c.n_layers,
        metadata_params={nn.PARTITION_NAME: 'layers'})
    local = jnp.asarray(c.local_layers) if any(c.local_layers) else None
    where = whole(c, positions_BL, segments_BL, longest)
    x_BLD, _ = layers(c, train=train, name='layers')(self.embed(tokens_BL), None, local, where, rotation(c, positions_BL))
    return self.final_norm(x_BLD)

  def embed(self, tokens_BL: jax.Array) -> jax.Array:
    """What the first layer reads, [B, L, D]."""
    c = self.config
    x_BLD = jnp.take(self.embedding, tokens_BL, axis=0).astype(c.compute_dtype)
    # A device looks up the part of the width that it holds, for the rows of all who hold the others: what crosses is these
    # parts, and back their gradients. Left to itself, the compiler may gather the gradients of all rows of the batch.
    x_BLD = nn.with_logical_constraint(x_BLD, ('lookup_rows', 'length', 'embed'))
    if c.embed_scale:
      x_BLD = x_BLD * jnp.asarray(c.embed_dim**0.5, x_BLD.dtype)
    return nn.with_logical_constraint(x_BLD, ('batch', 'length', 'activation_embed'))

  def normed(self, x_BLD: jax.Array) -> jax.Array:
    """The hidden states [B, L, D], of what the last layer writes."""
    return self.final_norm(x_BLD)

  @property
  def _head_VD(self) -> jax.Array:
    return self.embedding if self.config.tied_head else self.head

  def logits(self, hidden_BLD: jax.Array) -> jax.Array:
    """float32 logits [..., V]."""
    return softcap(product(hidden_BLD, self._head_VD.astype(hidden_BLD.dtype).T, 1, jnp.float32), self.config.logit_softcap)

  def weighted_nll(self, hidden_BLD: jax.Array, labels_BL: jax.Array, weights_BL: jax.Array, *, block: int) -> jax.Array:
    """Σ w · −log p(label), float32, nats: see `head.weighted_nll`."""
    return weighted_nll(hidden_BLD, self._head_VD, labels_BL, weights_BL, block=block, cap=self.config.logit_softcap)


def boxed_params(config: DecoderConfig) -> Any:
  """Shapes and dtypes of the decoder's parameters, each with its logical axis names."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens, tokens)['params']


def abstract_params(config: DecoderConfig) -> Any:
  """Shapes and dtypes of the decoder's parameters."""
  return nn.unbox(boxed_params(config))
