"""Rotary positions: the angle of each channel at each position (Su et al. 2021), with the stretched variants."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.models.decoder_config import DecoderConfig


@flax.struct.dataclass
class Rotation:
  """Sines and cosines, float32 [B, L, 1, K/2]: of global layers, and of local layers where these differ."""

  sin: jax.Array
  cos: jax.Array
  local_sin: jax.Array | None = None
  local_cos: jax.Array | None = None

  def rotate(self, x_BLHK: jax.Array, local: jax.Array | None) -> jax.Array:
    """Turns channel i with channel i + K/2, in float32. `local`: whether the layer is one, bool []."""
    sin, cos = self.sin, self.cos
    if self.local_sin is not None:
      sin, cos = jnp.where(local, self.local_sin, sin), jnp.where(local, self.local_cos, cos)
    x1, x2 = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BLHK.dtype)


def rotation(config: DecoderConfig, positions_BL: jax.Array) -> Rotation:
  """The rotation of every position, once for all layers."""
  positions_BL11 = positions_BL[..., None, None].astype(jnp.float32)
  angles = lambda frequency_K: positions_BL11 * jnp.asarray(frequency_K, jnp.float32)[None, None, None, :]
  angle_BL1K = angles(scaled(frequencies(config.head_dim, config.rope_base), config))
  if config.local_rope_base is None:
    return Rotation(jnp.sin(angle_BL1K), jnp.cos(angle_BL1K))
  local_BL1K = angles(frequencies(config.head_dim, config.local_rope_base))
  return Rotation(jnp.sin(angle_BL1K), jnp.cos(angle_BL1K), jnp.sin(local_BL1K), jnp.cos(local_BL1K))


def frequencies(head_dim: int, base: float) -> np.ndarray:
  """Radians a position of each pair of channels: base^(-2i / head_dim), float64 [head_dim / 2]."""
  return base ** (-np.arange(0, head_dim, 2) / head_dim)


def scaled(frequency_K: np.ndarray, config: DecoderConfig) -> np.ndarray:
  """The frequencies of global layers: slowed down as `rope_scaling` says, see `DecoderConfig`."""
  if config.rope_scaling == 'none':
    return frequency_K
  slow_K = frequency_K / config.rope_factor
  if config.rope_scaling == 'linear':
    return slow_K
  turns_K = config.rope_original_length * frequency_K / (2 * math.pi)  # within the length that was trained on first
  low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
  kept_K = np.clip((turns_K - low) / (high - low), 0, 1)
  return (1 - kept_K) * slow_K + kept_K * frequency_K
