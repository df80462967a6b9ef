"""The shape of a decoder: one description that covers Llama, Qwen and Gemma layouts."""

import dataclasses

import jax
import jax.numpy as jnp

from calrec_jax.errors import UserError

# What of a layer is kept for the backward pass. What lies between products costs more to keep than to compute anew.
REMAT_POLICIES = {
    'none': jax.checkpoint_policies.save_only_these_names('product', 'attention'),  # no weight's product is computed twice
    'dots': jax.checkpoint_policies.save_only_these_names('product'),  # attention is
    'full': jax.checkpoint_policies.nothing_saveable,
}
PROJECTIONS = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')  # a layer's linear maps

_CHOICES = {
    'rope_scaling': ('none', 'linear', 'llama3'), 'activation': ('silu', 'gelu'), 'dtype': ('auto', 'float32', 'bfloat16'),
    'param_dtype': ('float32', 'bfloat16'), 'attention': ('auto', 'splash', 'interpreted', 'packed'),
    'remat': tuple(REMAT_POLICIES)}
_NOT_SHAPE = ('dropout', 'dtype', 'param_dtype', 'attention', 'remat')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The shape of a decoder.

  Attributes:
    vocab_size: rows of the embedding; at least the vocabulary's size. None: the vocabulary's size.
    n_layers, embed_dim, n_heads, n_kv_heads, head_dim, ff_dim: sizes; `n_kv_heads` divides `n_heads`.
    rope_base: base of the rotary wave lengths.
    rope_scaling: how wave lengths are stretched: `none`; `linear`, all by `rope_factor`; `llama3`, those longer than
      `rope_original_length` / `rope_low_freq_factor` tokens by `rope_factor`, those shorter than `rope_original_length` /
      `rope_high_freq_factor` not, and between the two in between.
    rope_factor, rope_low_freq_factor, rope_high_freq_factor, rope_original_length: see `rope_scaling`.
    local_rope_base: the base in local layers, where nothing is stretched (Gemma 3). None: they are as the others.
    window: tokens that a local layer sees, the query's own included.
    layer_pattern: G (global) or L (local) for each layer, repeated to `n_layers`: 'LG' is Gemma 2, 'LLLLLG' Gemma 3.
    norm_eps: added to the mean square in RMSNorm.
    norm_unit_offset: RMSNorm multiplies by 1 + scale (Gemma).
    post_norms: each block's two halves are normalised before they are added (Gemma 2 and 3).
    qk_norm: queries and keys are normalised, each head's (Qwen 3, Gemma 3).
    qkv_bias, out_bias, mlp_bias: biases of the attention's inputs (Qwen 2), of its output, of the feed-forward block.
    activation: of the gate: `silu`, or `gelu` in its tanh form.
    query_scale: multiplies the attention scores. None: head_dim ** -0.5.
    attention_softcap, logit_softcap: c, where c · tanh(x / c) bounds scores or logits (Gemma 2). None: unbounded.
    embed_scale: embeddings are multiplied by embed_dim ** 0.5 (Gemma).
    tied_head: the head is the embedding, transposed.
    user_half_life: v_U is a mean over the history, in which a token that is so many tokens older weighs half as much. None:
      all weigh the same, as in the paper.
    dropout: rate on the output of each block's two halves, in training only.
    dtype: computation; `float32`, `bfloat16`, or `auto` (bfloat16 on accelerators, float32 on CPU).
    param_dtype: the parameters; updates are rounded to `bfloat16` at random, without bias.
    attention: over whole sequences: `packed` (any device), `splash` (kernels for TPU), `interpreted` (they, on any device),
      or `auto` (splash on TPU, else packed).
    remat: what the backward pass computes anew: `none` (what lies between products, and scores), `dots` (all of attention
      too) or `full` (the whole layer).
    lora_rank: 0: all weights are trained. Else the projections named in `lora_targets` each get two factors of this rank, and
      only these are trained (Hu et al. 2021).
    lora_alpha: the factors' product is multiplied by lora_alpha / lora_rank.
    lora_targets: some of `query`, `key`, `value`, `out`, `gate`, `up`, `down`.
  """

  vocab_size: int | None = None
  n_layers: int = 4
  embed_dim: int = 128
  n_heads: int = 4
  n_kv_heads: int = 2
  head_dim: int = 32
  ff_dim: int = 384
  rope_base: float = 10_000.0
  rope_scaling: str = 'none'
  rope_factor: float = 1.0
  rope_low_freq_factor: float = 1.0
  rope_high_freq_factor: float = 4.0
  rope_original_length: int = 8192
  local_rope_base: float | None = None
  window: int | None = None
  layer_pattern: str = 'G'
  norm_eps: float = 1e-5
  norm_unit_offset: bool = False
  post_norms: bool = False
  qk_norm: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'
  query_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  embed_scale: bool = False
  tied_head: bool = True
  user_half_life: float | None = None
  dropout: float = 0.0
  dtype: str = 'auto'
  param_dtype: str = 'float32'
  attention: str = 'auto'
  remat: str = 'none'
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_targets: tuple[str, ...] = PROJECTIONS

  def __post_init__(self):
    object.__setattr__(self, 'lora_targets', tuple(self.lora_targets))  # lists come out of JSON
    for name, choices in _CHOICES.items():
      if getattr(self, name) not in choices:
        raise UserError(f'decoder.{name} = {getattr(self, name)!r}: choose one of {", ".join(map(repr, choices))}.')
    if self.n_heads % self.n_kv_heads:
      raise UserError(f'decoder.n_heads = {self.n_heads} is not a multiple of decoder.n_kv_heads = {self.n_kv_heads}.')
    if self.head_dim % 2:
      raise UserError(f'decoder.head_dim = {self.head_dim}: rotary positions need an even number.')
    if not self.layer_pattern or set(self.layer_pattern) - set('GL'):
      raise UserError(f'decoder.layer_pattern = {self.layer_pattern!r}: write one G (global) or L (local) for each layer.')
    if ('L' in self.layer_pattern) != (self.window is not None) or (self.window is not None and self.window < 1):
      raise UserError(f'decoder.layer_pattern = {self.layer_pattern!r} with decoder.window = {self.window}: local layers (L), '
                      'and only they, need a window of at least 1 token.')
    if self.rope_scaling == 'llama3' and self.rope_high_freq_factor <= self.rope_low_freq_factor:
      raise UserError(f'decoder.rope_high_freq_factor = {self.rope_high_freq_factor}: must be above '
                      f'decoder.rope_low_freq_factor = {self.rope_low_freq_factor}.')
    if self.user_half_life is not None and self.user_half_life <= 0:
      raise UserError(f'decoder.user_half_life = {self.user_half_life}: give tokens, above 0, or None.')
    if self.lora_rank < 0 or (self.lora_rank and not self.lora_targets) or set(self.lora_targets) - set(PROJECTIONS):
      raise UserError(f'decoder.lora_rank = {self.lora_rank}, decoder.lora_targets = {self.lora_targets}: give a rank of at '
                      f'least 1, and some of {", ".join(PROJECTIONS)}.')

  @property
  def compute_dtype(self) -> jnp.dtype:
    if self.dtype == 'auto':
      return jnp.dtype(jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16)
    return jnp.dtype(self.dtype)

  @property
  def splash(self) -> bool:
    """Whether whole sequences attend by the splash kernels."""
    return jax.default_backend() == 'tpu' if self.attention == 'auto' else self.attention != 'packed'

  @property
  def attention_scale(self) -> float:
    """What attention scores are multiplied by."""
    return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

  @property
  def local_layers(self) -> tuple[bool, ...]:
    """Which layers see a window only: `layer_pattern`, repeated and cut to `n_layers`."""
    return tuple(self.layer_pattern[layer % len(self.layer_pattern)] == 'L' for layer in range(self.n_layers))

  def shape(self) -> dict:
    """What a checkpoint's arrays and outputs depend on, as JSON has it: all fields but dropout, dtypes, attention, remat."""
    fields = dataclasses.asdict(self) | {'lora_targets': list(self.lora_targets)}
    return {name: value for name, value in fields.items() if name not in _NOT_SHAPE}
