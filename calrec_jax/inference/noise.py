"""The noise of sampling: a function of (seed, user, sample, place in the text, token) and of nothing else.

A text is then the same in any batch, and the noise of some tokens is had without that of all others. Keys come from JAX's
threefry, a key a sample and place; a key's bits for a token come from two rounds of MurmurHash3's finalizer (Appleby 2011),
which costs a tenth of threefry: at 49,152 tokens a choice the noise would cost as much as a layer.
"""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def user_keys(seed: int, user_ids: Sequence[str]) -> np.ndarray:
  """uint32 [U, 2], a hash of the seed and the user's id: whatever the user's place in a file or batch."""
  digests = [hashlib.sha256(f'{seed}\n{user_id}'.encode()).digest()[:8] for user_id in user_ids]
  return np.frombuffer(b''.join(digests), '<u4').reshape(-1, 2)


def sample_keys(user_keys_U2: jax.Array, n_samples: int) -> jax.Array:
  """A typed key for each sample [U, N]; sample n's does not depend on how many there are."""
  keys_U = jax.random.wrap_key_data(jnp.asarray(user_keys_U2, jnp.uint32), impl='threefry2x32')
  return jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(n_samples)))(keys_U)


def gumbel(keys_R: jax.Array, place: jax.Array, tokens_RC: jax.Array) -> jax.Array:
  """Gumbel noise, float32 [R, C], of each row's tokens at a place in the text.

  Args:
    keys_R: typed keys, see `sample_keys`.
    place: int32 [].
    tokens_RC: int32 [R, C], or [1, C] where all rows have the same.
  """
  key_R2 = jax.random.key_data(jax.vmap(lambda key: jax.random.fold_in(key, place))(keys_R))
  bits_RC = _mix(_mix(tokens_RC.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ key_R2[:, :1]) ^ key_R2[:, 1:])
  uniform_RC = ((bits_RC >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # inside (0, 1)
  return -jnp.log(-jnp.log(uniform_RC))


def _mix(bits: jax.Array) -> jax.Array:
  bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
  return bits ^ bits >> 16
