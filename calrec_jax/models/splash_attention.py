"""Attention over packed sequences on TPU: JAX's splash kernels, forward and backward, with segments, windows and soft caps.

The kernels (Pallas) read blocks of keys that some query of a block can see, and no others; scores never leave the chip's vector
memory. They run on each device by itself: rows lie over the data-parallel axes, heads over the model axis.

Axes: B rows, L length, H heads, G key-value heads, K head dim.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

LANES = 128  # the kernels' blocks are multiples of this
LARGEST_BLOCK = 512  # queries or keys at once


def attend(q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, segments_BL: jax.Array, *, scale: float,
           cap: float | None = None, window: int | None = None, longest: int | None = None,
           interpret: bool = False) -> jax.Array:
  """Causal attention within segments, [B, L, H, K]; softmax in float32. What `packed_attention.attend` computes.

  Args:
    q_BLHK: queries.
    k_BLGK, v_BLGK: keys and values; G divides H.
    segments_BL: int32; a token sees those before it of its own segment.
    scale: multiplies the scores.
    cap: soft cap of the scores, or None.
    window: tokens that a query sees, its own included, or None.
    longest: a promise that no segment has more tokens, or None.
    interpret: run the kernels on any device, slowly, as JAX interprets them.
  """
  (B, L, H, _), G = q_BLHK.shape, k_BLGK.shape[2]
  seen = min(n for n in (window, longest, L) if n is not None)
  mesh = jax.sharding.get_abstract_mesh()
  rows, heads = _axes('batch', mesh, B), _axes('heads', mesh, H)
  if heads is not None and _axes('kv_heads', mesh, G) is None:
    # Fewer key-value heads than devices to share the queries' heads: each head gets a copy of its own.
    k_BLGK, v_BLGK = (jnp.repeat(x, H // G, axis=2) for x in (k_BLGK, v_BLGK))
  pad = -L % LANES
  widen = lambda x, value=0: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), constant_values=value)
  q, k, v = (widen(x).swapaxes(1, 2) for x in ((q_BLHK * scale).astype(q_BLHK.dtype), k_BLGK, v_BLGK))
  segments = widen(segments_BL, -1)

  def on_device(q_BHLK: jax.Array, k_BGLK: jax.Array, v_BGLK: jax.Array, segments_BL: jax.Array) -> jax.Array:
    kernel = _kernel(L + pad, q_BHLK.shape[1], seen, cap, interpret)
    return jax.vmap(kernel)(q_BHLK, k_BGLK, v_BGLK, splash.SegmentIds(q=segments_BL, kv=segments_BL))
  if not mesh.empty:
    of_heads = P(rows, heads)
    on_device = jax.shard_map(on_device, mesh=mesh, in_specs=(of_heads, of_heads, of_heads, P(rows)), out_specs=of_heads,
                              check_vma=False)
  return on_device(q, k, v, segments).swapaxes(1, 2)[:, :L]


def _axes(name: str, mesh: jax.sharding.AbstractMesh, size: int) -> tuple[str, ...] | None:
  """The mesh axes that a logical axis of this size is divided over, by the rules that are set; None: over none."""
  if mesh.empty:
    return None
  axes = nn.logical_to_mesh_axes((name,))[0] or ()
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  parts = math.prod(mesh.shape[axis] for axis in axes)
  return axes if axes and size % parts == 0 else None


def _kernel(length: int, n_heads: int, seen: int, cap: float | None, interpret: bool) -> splash.SplashAttentionKernel:
  """Of one row."""
  mask = masks.CausalMask((length, length)) if seen >= length else masks.LocalMask((length, length), (seen - 1, 0), 0)
  block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
  sizes = splash.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
                            block_q_dq=block, block_kv_dq=block)
  return splash.make_splash_mha(masks.MultiHeadMask([mask] * n_heads), block_sizes=sizes, attn_logits_soft_cap=cap,
                                head_shards=1, q_seq_shards=1, residual_checkpoint_name='attention', interpret=interpret)
