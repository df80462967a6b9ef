"""The small layers that blocks are made of: RMSNorm, a linear map with its low-rank factors, the gated feed-forward block.

Axes: B rows, L length, D embed, F feed-forward.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from calrec_jax.models.decoder_config import DecoderConfig

TRANSPOSED = 'transposed'  # a kernel as [outputs, inputs], which decoding reads: see `decoding.by_layer`


def _lead(x: jax.Array, ndim: int) -> jax.Array:
  """x with leading axes of size 1, `ndim` in all."""
  return jnp.expand_dims(x, range(ndim - x.ndim))


def product(x: jax.Array, kernel: jax.Array, axes: int, dtype: jnp.dtype | None = None) -> jax.Array:
  """Sums over the last `axes` of x and the first of the kernel, as one product of two matrices; `dtype`: of the result.

  With the leading axes of x left as they are, XLA lays gradients out anew around every product on CPU: half the speed.
  """
  rows = x.reshape(math.prod(x.shape[:x.ndim - axes]), -1)
  columns = kernel.reshape(rows.shape[1], -1)
  y = checkpoint_name(jnp.matmul(rows, columns, preferred_element_type=dtype), 'product')
  return y.reshape(*x.shape[:x.ndim - axes], *kernel.shape[axes:])


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap · tanh(x / cap), or x without a cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x²) + eps) · scale over the last axis, in float32 (Zhang and Sennrich 2019); Gemma's scale is 1 + `scale`."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    c = self.config
    init = nn.initializers.zeros if c.norm_unit_offset else nn.initializers.ones
    scale_D = self.param('scale', nn.with_logical_partitioning(init, ('norm',)), x_BLD.shape[-1:], c.param_dtype)
    scale_D = scale_D.astype(jnp.float32) + float(c.norm_unit_offset)
    x32_BLD = x_BLD.astype(jnp.float32)
    mean_BL1 = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
    return (x32_BLD * jax.lax.rsqrt(mean_BL1 + c.norm_eps) * _lead(scale_D, x_BLD.ndim)).astype(x_BLD.dtype)


class Projection(nn.Module):
  """A linear map of the last axes, x · kernel + bias, to which `lora_rank` adds (x · lora_a) · lora_b · lora_alpha / rank.

  Attributes:
    config: has the parameters' dtype and the low-rank options.
    inputs, outputs: sizes of the axes that are summed over, and of those that they become.
    input_axes, output_axes: their logical names.
    bias: whether there is one.
    name: of the layer; one of `PROJECTIONS`.

  The parameters have a `kernel` [inputs, outputs], or in its place a `transposed` one.
  """

  config: DecoderConfig
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  input_axes: tuple[str, ...]
  output_axes: tuple[str, ...]
  bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, axes = self.config, len(self.inputs)
    def weight(name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], names: tuple[str, ...]) -> jax.Array:
      return self.param(name, nn.with_logical_partitioning(init, names), shape, c.param_dtype).astype(x.dtype)
    normal, zeros = nn.initializers.normal(math.prod(self.inputs) ** -0.5), nn.initializers.zeros
    if self.has_variable('params', TRANSPOSED):
      kernel_OI = self.get_variable('params', TRANSPOSED).astype(x.dtype)
      rows = x.reshape(*x.shape[:x.ndim - axes], -1)
      y = product(rows, kernel_OI.T, 1).reshape(*rows.shape[:-1], *self.outputs)
    else:
      y = product(x, weight('kernel', normal, (*self.inputs, *self.outputs), (*self.input_axes, *self.output_axes)), axes)
    if c.lora_rank and self.name in c.lora_targets:
      a = weight('lora_a', normal, (*self.inputs, c.lora_rank), (*self.input_axes, 'lora'))
      b = weight('lora_b', zeros, (c.lora_rank, *self.outputs), ('lora', *self.output_axes))
      y = y + product(product(x, a, axes), b, 1) * (c.lora_alpha / c.lora_rank)
    return y + _lead(weight('bias', zeros, self.outputs, self.output_axes), y.ndim) if self.bias else y


class GatedMlp(nn.Module):
  """Gated feed-forward block: down(activation(gate(x)) · up(x)) (Shazeer 2020)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    c, D, F = self.config, x_BLD.shape[-1], self.config.ff_dim
    activation = {'silu': nn.silu, 'gelu': lambda x: nn.gelu(x, approximate=True)}[c.activation]
    gate_BLF = Projection(c, (D,), (F,), ('embed',), ('mlp',), c.mlp_bias, name='gate')(x_BLD)
    up_BLF = Projection(c, (D,), (F,), ('embed',), ('mlp',), c.mlp_bias, name='up')(x_BLD)
    return Projection(c, (F,), (D,), ('mlp',), ('embed',), c.mlp_bias, name='down')(activation(gate_BLF) * up_BLF)
