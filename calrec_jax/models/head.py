"""The head and its loss: −log p of the target tokens, a block of them at a time, forward and backward in one pass.

Target positions lie anywhere in a batch, more in some rows than in others. Each device brings those of its rows together and
runs as many blocks as they fill, so the work is that of the targets, and the logits of one block only are in memory. A
block's gradient is formed with its loss, while the logits are there: three products and no recomputation.

Axes: B rows, L length, D embed, V vocabulary; G devices that rows lie on, N = B · L / G positions of each, C of them a block.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from calrec_jax.models.layers import product, softcap

BLOCK = 512  # positions of a device at once


def weighted_nll(hidden_BLD: jax.Array, table_VD: jax.Array, labels_BL: jax.Array, weights_BL: jax.Array, *,
                 block: int = BLOCK, cap: float | None = None) -> jax.Array:
  """Σ w · −log p(label) over all positions, float32, nats; the head runs where w is not 0 only.

  Args:
    hidden_BLD: hidden states.
    table_VD: the head's weights, whose products with a hidden state are the logits.
    labels_BL: int32, what is predicted.
    weights_BL: float32; they have no gradient.
    block: positions of a device whose logits are in memory at once.
    cap: soft cap of the logits, or None.
  """
  B, L, D = hidden_BLD.shape
  G = math.gcd(_batch_devices(), B)
  rows = lambda x: nn.with_logical_constraint(x.reshape(G, B * L // G, *x.shape[2:]), ('batch', *(None,) * (x.ndim - 1)))
  return _weighted_nll(min(block, B * L // G), cap, rows(hidden_BLD), table_VD, rows(labels_BL), rows(weights_BL))


def _batch_devices() -> int:
  """How many devices rows lie on, by the mesh and the rules that are set."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = nn.logical_to_mesh_axes(('batch',))[0] if not mesh.empty else ()
  return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_nll(block, cap, hidden_GND, table_VD, labels_GN, weights_GN):
  return _blocks(block, cap, hidden_GND, table_VD, labels_GN, weights_GN, gradient=False)[0]


def _forward(block, cap, hidden_GND, table_VD, labels_GN, weights_GN):
  return _blocks(block, cap, hidden_GND, table_VD, labels_GN, weights_GN, gradient=True)


def _backward(block, cap, grads, slope):
  return *jax.tree.map(lambda grad: (grad * slope).astype(grad.dtype), grads), None, None


_weighted_nll.defvjp(_forward, _backward)


def _blocks(C: int, cap: float | None, hidden_GND: jax.Array, table_VD: jax.Array, labels_GN: jax.Array, weights_GN: jax.Array,
            *, gradient: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
  """The sum, and its gradients in the hidden states and the table."""
  (G, N, D), V = hidden_GND.shape, len(table_VD)
  table = nn.with_logical_constraint(table_VD.astype(hidden_GND.dtype), ('vocab', None))  # gathered once, not a block
  pick = lambda x_GN, at_GC: jnp.take_along_axis(x_GN, at_GC, axis=1, mode='fill', fill_value=0)
  pick_states = lambda x_GND, at_GC: jnp.take_along_axis(x_GND, at_GC[..., None], axis=1, mode='fill', fill_value=0)
  # Target positions first; what fills the last block lies behind the end, and is not read.
  is_target_GN = weights_GN != 0
  n_targets_G1 = jnp.sum(is_target_GN, axis=1, keepdims=True)
  order_GN = jnp.argsort(~is_target_GN, axis=1, stable=True)
  order_GN = jnp.pad(jnp.where(jnp.arange(N)[None] < n_targets_G1, order_GN, N), ((0, 0), (0, -N % C)), constant_values=N)
  n_blocks = -(-jnp.max(n_targets_G1) // C)

  # Each device adds up its own: they are summed once, after the last block.
  def one_block(number: jax.Array, sums: tuple) -> tuple:
    total_G, grads = sums
    at_GC = jax.lax.dynamic_slice_in_dim(order_GN, number * C, C, axis=1)
    hidden_GCD, weights_GC = pick_states(hidden_GND, at_GC), pick(weights_GN, at_GC)
    # The vocabulary comes first: products and sums over it run at twice the speed on CPU.
    logits_VGC = product(table, hidden_GCD.reshape(G * C, D).T, 1, jnp.float32).reshape(V, G, C)
    logits_VGC = softcap(nn.with_logical_constraint(logits_VGC, ('vocab', 'batch', None)), cap)
    # The label's logit is picked by a comparison, not by an index: with the vocabulary over several devices each one sums
    # what it has, and no device holds all logits of a token.
    is_label_VGC = jax.lax.broadcasted_iota(jnp.int32, logits_VGC.shape, 0) == pick(labels_GN, at_GC)[None]
    norm_GC = jax.nn.logsumexp(logits_VGC, axis=0)
    picked_GC = jnp.sum(jnp.where(is_label_VGC, logits_VGC, 0.0), axis=0)
    total_G += jnp.sum(weights_GC * (norm_GC - picked_GC), axis=1)
    if not gradient:
      return total_G, grads
    slopes_VGC = weights_GC[None] * (jnp.exp(logits_VGC - norm_GC[None]) - is_label_VGC)
    if cap is not None:
      slopes_VGC *= 1 - jnp.square(logits_VGC / cap)
    slopes_VGC = slopes_VGC.astype(hidden_GND.dtype)
    of_targets_GND, of_table_GVD = grads
    of_hidden_GCD = product(slopes_VGC.reshape(V, G * C).T, table, 1).reshape(G, C, D)
    of_targets_GND = jax.lax.dynamic_update_slice_in_dim(of_targets_GND, of_hidden_GCD, number * C, axis=1)
    of_table_GVD += jnp.einsum('vgc,gcd->gvd', slopes_VGC, hidden_GCD, preferred_element_type=jnp.float32)
    return total_G, (of_targets_GND, of_table_GVD)

  if not gradient:
    return jnp.sum(jax.lax.fori_loop(0, n_blocks, one_block, (jnp.zeros(G), None))[0]), None
  of_targets_GND = jnp.zeros((G, order_GN.shape[1], D), hidden_GND.dtype)  # in the order of the blocks
  of_table_GVD = nn.with_logical_constraint(jnp.zeros((G, V, D), jnp.float32), ('batch', 'vocab', None))
  total_G, grads = jax.lax.fori_loop(0, n_blocks, one_block, (jnp.zeros(G), (of_targets_GND, of_table_GVD)))
  rank_GN = jnp.where(is_target_GN, jnp.cumsum(is_target_GN, axis=1) - 1, order_GN.shape[1])
  return jnp.sum(total_G), (pick_states(grads[0], rank_GN), jnp.sum(grads[1], axis=0).astype(table_VD.dtype))
