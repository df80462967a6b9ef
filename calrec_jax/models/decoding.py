"""The decoder layer by layer, for inference: prefixes are read once, then branches go on from them (law 6).

Training scans its layers, as compile time must not grow with them. A step of decoding does little work a weight: there the
copy of each layer's weights out of the stack that a scan makes on CPU costs as much as the step. So each layer has arrays of
its own here, and kernels are transposed: products of few rows read those faster. The modules are those of `decoder.py`.

Axes: U users, W branches of each at most, B branches in all (texts that are being written), P padded prefix length, T suffix
length, S new tokens of a branch; L length, D embed, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from calrec_jax.models.attention import Cache, Step, Whole, whole
from calrec_jax.models.decoder import Block, Decoder
from calrec_jax.models.layers import TRANSPOSED
from calrec_jax.models.rope import rotation
from calrec_jax.models.two_tower import pool, recency

Caches = tuple[Cache, ...]  # of all layers


@flax.struct.dataclass
class Prefix:
  """What is kept of the users' prefixes.

  Attributes:
    caches: keys and values of each layer, held once a user, whatever the number of branches.
    mask_UP: bool, which positions are no padding.
    lengths_U: int32.
    last_UD: the hidden state of each one's last token, which the first new token is predicted from.
    user_UD: float32, v_U: the mean of the hidden states, BOS left out (method: Towers), weighted where `prefill` says so.
  """

  caches: Caches
  mask_UP: jax.Array
  lengths_U: jax.Array
  last_UD: jax.Array
  user_UD: jax.Array


def by_layer(params: Mapping) -> dict[str, Any]:
  """The decoder's parameters with `layers` a tuple, a tree for each layer, in the place of stacked arrays.

  Kernels become `TRANSPOSED` ones, [outputs, inputs] of all axes together.
  """
  if isinstance(params['layers'], tuple):
    return dict(params)
  layers = [{} for _ in jax.tree.leaves(params['layers'])[0]]
  for path, stacked in traverse_util.flatten_dict(params['layers']).items():
    for layer, x in zip(layers, stacked, strict=True):
      if path[-1] == 'kernel':
        layer[*path[:-1], TRANSPOSED] = jnp.array(x.reshape(-1, x.shape[-1]) if path[-2] == 'out' else x.reshape(len(x), -1)).T
      else:
        layer[path] = jnp.array(x)
  return {**params, 'layers': tuple(map(traverse_util.unflatten_dict, layers))}


def prefill(decoder: Decoder, params: Mapping, tokens_UP: jax.Array, lengths_U: jax.Array, *, bos: bool,
            half_life: float | None = None) -> Prefix:
  """Reads prefixes, padded on the right with any token id.

  Args:
    decoder: the model.
    params: the parameters by layer.
    tokens_UP: int32, the prefixes.
    lengths_U: int32, tokens of each.
    bos: whether each begins with one, which no mean counts.
    half_life: tokens before the last by which a token weighs half as much in the mean (`DecoderConfig.user_half_life`).
  """
  U, P = tokens_UP.shape
  positions_UP = jnp.broadcast_to(jnp.arange(P)[None], (U, P))
  mask_UP = positions_UP < lengths_U[:, None]
  where = whole(decoder.config, positions_UP, mask_UP.astype(jnp.int32))
  hidden_UPD, caches = _run(decoder, params, tokens_UP, where, None)
  last_UD = jnp.take_along_axis(hidden_UPD, (lengths_U - 1)[:, None, None], axis=1)[:, 0]
  counted_U1P = (mask_UP & (positions_UP >= int(bos)))[:, None]
  user_UD = pool(hidden_UPD, recency(counted_U1P, positions_UP, half_life))[:, 0]
  return Prefix(tuple(cache.heads_first() for cache in caches), mask_UP, lengths_U, last_UD, user_UD)


@flax.struct.dataclass
class Branches:
  """Which branches are whose; a user may have any number.

  Attributes:
    members_UW: int32, the branches of each user; any, where it has fewer.
    places_B: int32, where in these, flattened, a branch is.
  """

  members_UW: jax.Array
  places_B: jax.Array


def branches(users_B: np.ndarray, n_users: int, width: int) -> Branches:
  """The branches whose users are given, int [B]; no user has more than `width`."""
  order_B = np.argsort(users_B, kind='stable')
  counts_U = np.bincount(users_B, minlength=n_users)
  ranks_B = np.arange(len(users_B)) - np.repeat(np.cumsum(counts_U) - counts_U, counts_U)
  places_B = np.empty(len(users_B), np.int32)
  places_B[order_B] = users_B[order_B] * width + ranks_B
  members_X = np.zeros(n_users * width, np.int32)
  members_X[places_B] = np.arange(len(users_B))
  return Branches(members_X.reshape(n_users, width), places_B)


def extend(decoder: Decoder, params: Mapping, tokens_BS: jax.Array, prefix: Prefix, suffix: Caches, of: Branches,
           index: jax.Array | int) -> tuple[jax.Array, Caches]:
  """S more tokens for each branch, from `index` on in its suffix: hidden states [B, S, D], and the suffixes with them."""
  index = jnp.asarray(index, jnp.int32)
  lengths_B = prefix.lengths_U[of.places_B // of.members_UW.shape[1]]
  positions_BS = lengths_B[:, None] + index + jnp.arange(tokens_BS.shape[1])[None]
  where = Step(positions_BS, prefix.mask_UP, index, of.members_UW, of.places_B)
  return _run(decoder, params, tokens_BS, where, (prefix.caches, suffix))


def empty_suffix(decoder: Decoder, n_branches: int, length: int) -> Caches:
  """Suffixes with room for `length` tokens."""
  c = decoder.config
  zeros = lambda *sizes: jnp.zeros((n_branches, c.n_kv_heads, *sizes), c.compute_dtype)
  return tuple(Cache(zeros(length, c.head_dim), zeros(length, c.head_dim)) for _ in range(c.n_layers))


def logits(decoder: Decoder, params: Mapping, hidden_BD: jax.Array) -> jax.Array:
  """float32 [..., V]."""
  return decoder.apply({'params': params}, hidden_BD, method='logits')


def _run(decoder: Decoder, params: Mapping, tokens_BL: jax.Array, where: Whole | Step,
         caches: tuple[Caches, Caches] | None) -> tuple[jax.Array, Caches]:
  c, block = decoder.config, Block(decoder.config, keep_cache=True)
  turned = rotation(c, where.positions)
  x_BLD = decoder.apply({'params': params}, tokens_BL, method='embed')
  kept = []
  for number, layer in enumerate(params['layers']):
    local = jnp.asarray(c.local_layers[number]) if any(c.local_layers) else None
    of_layer = caches and (caches[0][number], caches[1][number])
    x_BLD, cache = block.apply({'params': layer}, x_BLD, of_layer, local, where, turned)
    kept.append(cache)
  return decoder.apply({'params': params}, x_BLD, method='normed'), tuple(kept)
