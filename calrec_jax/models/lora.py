"""Low-rank factors (Hu et al. 2021): which parameters they are, and how they are merged into the weights that they change."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from calrec_jax.models.decoder_config import DecoderConfig

FACTORS = ('lora_a', 'lora_b')


def merge(params: Any, config: DecoderConfig) -> tuple[Any, DecoderConfig]:
  """(the decoder's parameters with kernel + lora_a · lora_b · lora_alpha / lora_rank, its shape without factors).

  Args:
    params: of the decoder, unboxed.
    config: its shape. Without factors both are returned as they are.
  """
  if not config.lora_rank:
    return params, config
  flat = traverse_util.flatten_dict(params)
  scale = config.lora_alpha / config.lora_rank
  merged = {}
  for path, leaf in flat.items():
    if path[-1] == 'kernel' and (*path[:-1], 'lora_a') in flat:
      leaf = _product(leaf, flat[*path[:-1], 'lora_a'], flat[*path[:-1], 'lora_b'], scale)
    if path[-1] not in FACTORS:
      merged[path] = leaf
  return traverse_util.unflatten_dict(merged), plain(config)


def plain(config: DecoderConfig) -> DecoderConfig:
  """The shape without factors."""
  fields = {field.name: field.default for field in dataclasses.fields(config) if field.name.startswith('lora')}
  return dataclasses.replace(config, **fields)


@jax.jit
def _product(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """The merged kernels of all layers, computed in float32, in the kernel's dtype."""
  n = len(kernel)
  a_nIR, b_nRO = a.reshape(n, -1, a.shape[-1]).astype(jnp.float32), b.reshape(n, b.shape[1], -1).astype(jnp.float32)
  change = jnp.einsum('nir,nro->nio', a_nIR, b_nRO, precision='highest').reshape(kernel.shape) * scale
  return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
