"""The decoder: a Llama-type causal language model, configured and not subclassed.

RMSNorm before each block, rotary positions, grouped-query attention, gated feed-forward, tied or free head. Layers run
under one `nn.scan`, so that compile time does not grow with depth. Parameters are float32; `dtype` is what is computed in;
norms, softmax and logits are float32 always.

Axes: B rows, L length, D embed, H heads, G key-value heads, R = H / G, K head dim, F feed-forward, V vocabulary; in decoding
U users, N samples of each, P prefix length, T suffix length.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from calrec_jax.errors import UserError

REMAT_POLICIES = {
    'none': None,
    'dots': 'dots_with_no_batch_dims_saveable',  # keeps the outputs of the weight matrices, recomputes attention
    'full': 'nothing_saveable',
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The shape of a decoder.

  Attributes:
    vocab_size: rows of the embedding; at least the vocabulary's size. None: the vocabulary's size.
    n_layers, embed_dim, n_heads, n_kv_heads, head_dim, ff_dim: sizes; `n_kv_heads` divides `n_heads`.
    rope_base: base of the rotary wave lengths.
    norm_eps: added to the mean square in RMSNorm.
    tied_head: the head is the embedding, transposed.
    dropout: rate on the output of each block's two halves, in training only.
    dtype: computation; `float32`, `bfloat16`, or `auto` (bfloat16 on accelerators, float32 on CPU).
    remat: `none`, `dots` or `full`: what the backward pass recomputes.
  """

  vocab_size: int | None = None
  n_layers: int = 4
  embed_dim: int = 128
  n_heads: int = 4
  n_kv_heads: int = 2
  head_dim: int = 32
  ff_dim: int = 384
  rope_base: float = 10_000.0
  norm_eps: float = 1e-5
  tied_head: bool = True
  dropout: float = 0.0
  dtype: str = 'auto'
  remat: str = 'none'

  def __post_init__(self):
    if self.n_heads % self.n_kv_heads:
      raise UserError(f'decoder.n_heads = {self.n_heads} is not a multiple of decoder.n_kv_heads = {self.n_kv_heads}.')
    if self.head_dim % 2:
      raise UserError(f'decoder.head_dim = {self.head_dim}: rotary positions need an even number.')
    if self.remat not in REMAT_POLICIES:
      raise UserError(f'decoder.remat = {self.remat!r}: choose one of {sorted(REMAT_POLICIES)}.')
    if self.dtype not in ('auto', 'float32', 'bfloat16'):
      raise UserError(f"decoder.dtype = {self.dtype!r}: choose 'auto', 'float32' or 'bfloat16'.")

  @property
  def compute_dtype(self) -> jnp.dtype:
    if self.dtype == 'auto':
      return jnp.dtype(jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16)
    return jnp.dtype(self.dtype)

  def shape(self) -> dict:
    """What a checkpoint's arrays and outputs depend on: every field but dropout, dtype and remat."""
    fields = dataclasses.asdict(self)
    return {name: value for name, value in fields.items() if name not in ('dropout', 'dtype', 'remat')}


@flax.struct.dataclass
class Cache:
  """Keys (rotated) and values of one layer, or of all layers with a leading axis."""

  keys: jax.Array
  values: jax.Array


@flax.struct.dataclass
class Whole:
  """Where a whole sequence attends: `mask_BLL` is true where query i sees key j."""

  positions: jax.Array
  mask: jax.Array


@flax.struct.dataclass
class Step:
  """Where one new token of each sample attends: its user's prefix, and its own suffix up to and with `index`."""

  positions: jax.Array  # int32 [U, N]
  prefix_mask: jax.Array  # bool [U, P]
  index: jax.Array  # int32 [], where in the suffix the new token is


def causal_mask(segments_BL: jax.Array) -> jax.Array:
  """bool [B, L, L]: query i sees key j if j <= i and both are of one segment. Padding (segment 0) sees padding only."""
  same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
  return jnp.tril(same_BLL)


def rotate(x_BLHK: jax.Array, positions_BL: jax.Array, base: float) -> jax.Array:
  """Rotary positions (Su et al. 2021), halves layout: channel i turns with channel i + K/2. Computed in float32."""
  half = x_BLHK.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BL1K = positions_BL[..., None, None].astype(jnp.float32) * frequency[None, None, None, :]
  sin, cos = jnp.sin(angle_BL1K), jnp.cos(angle_BL1K)
  x1, x2 = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BLHK.dtype)


def attend_step(q_UNHK: jax.Array, prefix: Cache, suffix: Cache, step: Step) -> jax.Array:
  """Attention of N new tokens a user to the one prefix [U, P, G, K] and to each one's suffix [U, N, T, G, K]."""
  U, N, H, K = q_UNHK.shape
  G, T, P = prefix.keys.shape[2], suffix.keys.shape[2], prefix.keys.shape[1]
  q_UNGRK = q_UNHK.reshape(U, N, G, H // G, K) * K**-0.5
  prefix_UNGRP = jnp.einsum('ungrk,upgk->ungrp', q_UNGRK, prefix.keys, preferred_element_type=jnp.float32)
  suffix_UNGRT = jnp.einsum('ungrk,untgk->ungrt', q_UNGRK, suffix.keys, preferred_element_type=jnp.float32)
  seen_T = jnp.arange(T) <= step.index
  scores = jnp.concatenate([
      jnp.where(step.prefix_mask[:, None, None, None, :], prefix_UNGRP, -jnp.inf),
      jnp.where(seen_T[None, None, None, None, :], suffix_UNGRT, -jnp.inf)], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1).astype(q_UNHK.dtype)
  out_UNGRK = (jnp.einsum('ungrp,upgk->ungrk', weights[..., :P], prefix.values)
               + jnp.einsum('ungrt,untgk->ungrk', weights[..., P:], suffix.values))
  return out_UNGRK.reshape(U, N, H, K)


def _weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, dtype) -> jax.Array:
  init = nn.initializers.normal(fan_in**-0.5)
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32).astype(dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x²) + eps) · scale, in float32 (Zhang and Sennrich 2019)."""

  eps: float

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    scale_D = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), x_BLD.shape[-1:], jnp.float32)
    x32_BLD = x_BLD.astype(jnp.float32)
    mean_BL1 = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
    return (x32_BLD * jax.lax.rsqrt(mean_BL1 + self.eps) * scale_D[None, None, :]).astype(x_BLD.dtype)


class Attention(nn.Module):
  """Grouped-query attention over a whole sequence, or of one step against caches."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, caches: tuple[Cache, Cache] | None, where: Whole | Step) -> tuple[jax.Array, Cache]:
    c, D, dtype = self.config, x_BLD.shape[-1], x_BLD.dtype
    query_DHK = _weight(self, 'query', (D, c.n_heads, c.head_dim), ('embed', 'heads', 'kv'), D, dtype)
    key_DGK = _weight(self, 'key', (D, c.n_kv_heads, c.head_dim), ('embed', 'kv_heads', 'kv'), D, dtype)
    value_DGK = _weight(self, 'value', (D, c.n_kv_heads, c.head_dim), ('embed', 'kv_heads', 'kv'), D, dtype)
    out_HKD = _weight(self, 'out', (c.n_heads, c.head_dim, D), ('heads', 'kv', 'embed'), c.n_heads * c.head_dim, dtype)
    q_BLHK = rotate(jnp.einsum('bld,dhk->blhk', x_BLD, query_DHK), where.positions, c.rope_base)
    k_BLGK = rotate(jnp.einsum('bld,dgk->blgk', x_BLD, key_DGK), where.positions, c.rope_base)
    v_BLGK = jnp.einsum('bld,dgk->blgk', x_BLD, value_DGK)
    if caches is None:
      cache = Cache(k_BLGK, v_BLGK)
      attended_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, mask=where.mask[:, None])
    else:
      prefix, suffix = caches
      cache = Cache(suffix.keys.at[:, :, where.index].set(k_BLGK), suffix.values.at[:, :, where.index].set(v_BLGK))
      attended_BLHK = attend_step(q_BLHK, prefix, cache, where)
    return jnp.einsum('blhk,hkd->bld', attended_BLHK, out_HKD), cache


class GatedMlp(nn.Module):
  """Gated feed-forward block: down(silu(gate(x)) · up(x)), without biases (Shazeer 2020)."""

  ff_dim: int

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    D, F, dtype = x_BLD.shape[-1], self.ff_dim, x_BLD.dtype
    gate_DF = _weight(self, 'gate', (D, F), ('embed', 'mlp'), D, dtype)
    up_DF = _weight(self, 'up', (D, F), ('embed', 'mlp'), D, dtype)
    down_FD = _weight(self, 'down', (F, D), ('mlp', 'embed'), F, dtype)
    return (nn.silu(x_BLD @ gate_DF) * (x_BLD @ up_DF)) @ down_FD


class Block(nn.Module):
  """One layer. A scan's body: the carry is x, `caches` has a layer's slice, `where` is the same for all layers."""

  config: DecoderConfig
  keep_cache: bool
  train: bool

  @nn.compact
  def __call__(self, x_BLD: jax.Array, caches: tuple[Cache, Cache] | None,
               where: Whole | Step) -> tuple[jax.Array, Cache | None]:
    c = self.config
    drop = nn.Dropout(c.dropout, deterministic=not self.train)
    y_BLD, cache = Attention(c, name='attention')(RMSNorm(c.norm_eps, name='attention_norm')(x_BLD), caches, where)
    x_BLD = x_BLD + drop(y_BLD)
    x_BLD = x_BLD + drop(GatedMlp(c.ff_dim, name='mlp')(RMSNorm(c.norm_eps, name='mlp_norm')(x_BLD)))
    x_BLD = nn.with_logical_constraint(x_BLD, ('batch', 'length', 'activation_embed'))
    return x_BLD, cache if self.keep_cache else None


class Decoder(nn.Module):
  """Tokens to hidden states, and hidden states to logits.

  `__call__`, `prefill` and `step` are one computation: law 6 holds them equal.
  """

  config: DecoderConfig

  def setup(self):
    c = self.config
    table = nn.with_logical_partitioning(nn.initializers.normal(c.embed_dim**-0.5), ('vocab', 'embed'))
    self.embedding = self.param('embedding', table, (c.vocab_size, c.embed_dim), jnp.float32)
    if not c.tied_head:
      self.head = self.param('head', table, (c.vocab_size, c.embed_dim), jnp.float32)
    self.final_norm = RMSNorm(c.norm_eps)

  @nn.nowrap
  def _layers(self, keep_cache: bool, train: bool) -> nn.Module:
    block = Block
    policy = REMAT_POLICIES[self.config.remat]
    if policy and not keep_cache:
      block = nn.remat(Block, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=False)
    layers = nn.scan(
        block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True}, in_axes=(0, nn.broadcast),
        length=self.config.n_layers, metadata_params={nn.PARTITION_NAME: 'layers'})
    return layers(self.config, keep_cache, train, name='layers')

  @nn.compact
  def _hidden(self, tokens_BL: jax.Array, caches: tuple[Cache, Cache] | None, where: Whole | Step, keep_cache: bool,
              train: bool) -> tuple[jax.Array, Cache | None]:
    x_BLD = jnp.take(self.embedding, tokens_BL, axis=0).astype(self.config.compute_dtype)
    x_BLD = nn.with_logical_constraint(x_BLD, ('batch', 'length', 'activation_embed'))
    x_BLD, cache = self._layers(keep_cache, train)(x_BLD, caches, where)
    return self.final_norm(x_BLD), cache

  def __call__(self, tokens_BL: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array, *,
               train: bool = False) -> jax.Array:
    """Hidden states [B, L, D] after the final norm. Tokens of one segment see each other, causally, and nothing else."""
    return self._hidden(tokens_BL, None, Whole(positions_BL, causal_mask(segments_BL)), False, train)[0]

  def prefill(self, tokens_UP: jax.Array, segments_UP: jax.Array, positions_UP: jax.Array) -> tuple[jax.Array, Cache]:
    """Hidden states [U, P, D] and the caches of all layers, [layers, U, P, G, K]."""
    return self._hidden(tokens_UP, None, Whole(positions_UP, causal_mask(segments_UP)), True, False)

  def step(self, tokens_UN: jax.Array, prefix: Cache, suffix: Cache, where: Step) -> tuple[jax.Array, Cache]:
    """One token for each of N samples a user: hidden states [U, N, D] and the suffix caches [layers, U, N, T, G, K]."""
    return self._hidden(tokens_UN, (prefix, suffix), where, True, False)

  def logits(self, hidden_BLD: jax.Array) -> jax.Array:
    """float32 logits [..., V]."""
    table_VD = self.embedding if self.config.tied_head else self.head
    return jnp.einsum('...d,vd->...v', hidden_BLD, table_VD.astype(hidden_BLD.dtype), preferred_element_type=jnp.float32)

  def empty_suffix(self, users: int, samples: int, length: int) -> Cache:
    """Suffix caches of zeros for `length` steps."""
    c = self.config
    shape = (c.n_layers, users, samples, length, c.n_kv_heads, c.head_dim)
    return Cache(jnp.zeros(shape, c.compute_dtype), jnp.zeros(shape, c.compute_dtype))
