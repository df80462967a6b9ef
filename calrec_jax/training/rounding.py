"""Stochastic rounding: float32 values stored in bfloat16 without bias, so that small updates are not lost.

A value between two bfloat16 neighbours becomes the upper one with the probability that makes the mean right (Gupta et al.
2015).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


def _mixed(x: jax.Array) -> jax.Array:
  """A one-to-one map of uint32 that depends on all bits (the last step of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _noise(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
  """uint32 at random, a hash of the element's index and the key: uniform over keys, and the same on any mesh.

  `jax.random.bits` lays out words for all parameters on CPU: a step took 2.5 times the memory, more than in float32. This is
  computed where it is added.
  """
  first, second = jax.random.bits(key, (2,), jnp.uint32)
  index = jnp.zeros(shape, jnp.uint32)
  for axis, size in enumerate(shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  return _mixed(_mixed(index ^ first) + second)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
  """A float32 array in bfloat16, up or down at random: its mean over keys is x. What is not finite stays so."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = _noise(x.shape, key) >> 16  # as many bits as bfloat16 lacks
  rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def store(tree: Any, like: Any, key: jax.Array) -> Any:
  """float32 arrays in the dtypes of `like`; each leaf has noise of its own."""
  leaves, treedef = jax.tree.flatten(tree)
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
  return treedef.unflatten([
      stochastic_round(leaf, jax.random.fold_in(key, i)) if dtype == jnp.bfloat16 and leaf.dtype == jnp.float32 else leaf
      for i, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True))])


def as_float32(tree: Any) -> Any:
  """bfloat16 arrays as float32, the others as they are."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


@flax.struct.dataclass
class StoredState:
  """The state of an optimizer in bfloat16, and the number of updates, which the noise depends on."""

  count: jax.Array
  inner: Any


def stored_in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The same optimizer with its float32 state kept in bfloat16; it computes in float32, and is given that."""
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree)
  def init(params: Any) -> StoredState:
    return StoredState(jnp.zeros((), jnp.int32), half(optimizer.init(params)))
  def update(updates: Any, state: StoredState, params: Any = None) -> tuple[Any, StoredState]:
    updates, inner = optimizer.update(updates, as_float32(state.inner), params)
    inner = store(inner, state.inner, jax.random.fold_in(jax.random.key(0), state.count))
    return updates, StoredState(state.count + 1, inner)
  return optax.GradientTransformation(init, update)
