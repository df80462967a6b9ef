"""Floating-point operations that a model needs, whatever program computes it: no padding, the head at targets only."""

import numpy as np

from calrec_jax.models.decoder_config import DecoderConfig


def training_flops(decoder: DecoderConfig, lengths: np.ndarray, target_tokens: int) -> float:
  """Of one training step, forward and backward, products alone: three times the forward pass (remat counts as nothing).

  Args:
    decoder: its shape, with `vocab_size`.
    lengths: tokens of each segment that is read: histories, and texts alone. Attention is counted within them, causal.
    target_tokens: positions at which the head runs.
  """
  lengths = np.asarray(lengths, np.float64)
  heads, kv_heads = decoder.n_heads * decoder.head_dim, decoder.n_kv_heads * decoder.head_dim
  weights = decoder.embed_dim * (2 * heads + 2 * kv_heads + 3 * decoder.ff_dim)
  triangle = lambda n: np.sum(n * (n + 1) / 2)
  seen = decoder.n_layers * triangle(lengths)  # pairs of a query and a key that it sees
  if n_local := sum(decoder.local_layers):
    seen -= n_local * triangle(np.maximum(lengths - decoder.window, 0))
  forward = 2 * decoder.n_layers * weights * lengths.sum() + 4 * heads * seen
  return 3 * (forward + 2 * decoder.embed_dim * decoder.vocab_size * target_tokens)


# Peaks in bfloat16, as the makers give them, by the beginning of JAX's `device_kind`; the longest that fits counts.
PEAKS = {'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5': 459e12, 'TPU v6 lite': 918e12,
         'TPU v6e': 918e12, 'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12}


def peak_flops(device_kind: str) -> float | None:
  """A second, in bfloat16, of one device; None where it is not known (CPUs)."""
  known = [kind for kind in PEAKS if device_kind.startswith(kind)]
  return PEAKS[max(known, key=len)] if known else None
