"""Dense retrieval: items by the cosine of their text's embedding v_T and the user's v_U, and by what a text has beside it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_BLOCK = 256  # users at a time, in validation
_USERS = (1, 8, 32, 128)  # users at a time, in a search: each size is compiled once
_GROUP = 32  # texts of which the search first looks at the best one alone
_LARGE = 2**17  # texts from which on a search takes all devices of the process

Best = tuple[jax.Array, jax.Array]  # scores and texts, [devices, U, K] each: every device's best so far, the best first


def unit(x_ND: np.ndarray) -> np.ndarray:
  """Rows of length 1, float32; a row of zeros stays one."""
  x_ND = np.asarray(x_ND, np.float32)
  return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), np.float32(1e-12))


def _finite(x_ND: np.ndarray, rows: slice, what: str) -> np.ndarray:
  """Some rows as float32. Raises ValueError unless all numbers are finite."""
  x_ND = np.asarray(x_ND[rows], np.float32)
  bad = np.flatnonzero(~np.isfinite(np.linalg.norm(x_ND, axis=1)))
  if len(bad):
    raise ValueError(f'The embedding of {what} {rows.start + bad[0]} is not finite.')
  return x_ND


def better_and_tied(users_ND: np.ndarray, texts_TD: np.ndarray, items_T: np.ndarray,
                    targets_N: np.ndarray, seen_N: Sequence[np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
  """How many items of a catalogue lie above each user's target, and how many others at its score: int64 [N] each.

  A score is computed once a text, so that items with one text are tied exactly.

  Args:
    users_ND: float32, embeddings of users.
    texts_TD: float32, embeddings of texts.
    items_T: how many items have each text.
    targets_N: the target's text, one with an item.
    seen_N: the texts of items that do not count, the target not among them; None: all count.
  """
  better, tied = np.zeros(len(users_ND), np.int64), np.zeros(len(users_ND), np.int64)
  texts = np.flatnonzero(items_T)
  columns, counts = unit(texts_TD[texts]).T, items_T[texts]
  for start in range(0, len(users_ND), _BLOCK):
    block = slice(start, start + _BLOCK)
    scores = unit(users_ND[block]) @ columns
    own = np.take_along_axis(scores, np.searchsorted(texts, targets_N[block])[:, None], axis=1)
    better[block] = (scores > own) @ counts
    tied[block] = (scores == own) @ counts - 1
    for row, seen in enumerate(seen_N[block] if seen_N is not None else ()):
      seen_scores = scores[row, np.searchsorted(texts, seen)]
      better[start + row] -= np.count_nonzero(seen_scores > own[row])
      tied[start + row] -= np.count_nonzero(seen_scores == own[row])
  return better, tied


def _merge(best: Best, texts_BD: jax.Array, firsts: jax.Array, users_UD: jax.Array, allowed_UB: jax.Array | None,
           bonus_B: jax.Array | None) -> Best:
  """The best of `best` and of one more block of texts, on one device, whose numbers are higher.

  `top_k` takes the earlier of two equal scores, so all candidates stand in the order of their numbers. The best k texts
  lie in the k groups with the highest maxima (of equal groups the earlier), so only those are sorted.
  """
  best_UK, numbers_UK = best[0][0], best[1][0]
  (n_users, k), n_texts = best_UK.shape, len(texts_BD)
  if n_users == 1:  # a matrix times a vector: XLA reads the texts as they lie, at the memory's speed
    scores_UB = jnp.matmul(texts_BD, users_UD[0], precision=lax.Precision.HIGHEST)[None]
  else:
    scores_UB = jnp.matmul(users_UD, texts_BD.T, precision=lax.Precision.HIGHEST)
  if bonus_B is not None:
    scores_UB += bonus_B[None]
  if allowed_UB is not None:
    scores_UB = jnp.where(allowed_UB, scores_UB, -jnp.inf)
  scores_UB = lax.optimization_barrier(scores_UB)  # computed once, not again for each use
  texts_UC = jnp.broadcast_to(jnp.arange(n_texts, dtype=jnp.int32)[None], (n_users, n_texts))
  if k < n_texts // _GROUP:
    groups_UGB = scores_UB.reshape(n_users, -1, _GROUP)
    chosen_UK = jnp.sort(lax.top_k(groups_UGB.max(axis=2), k)[1], axis=1)
    scores_UB = jnp.take_along_axis(groups_UGB, chosen_UK[:, :, None], axis=1).reshape(n_users, -1)
    texts_UC = (chosen_UK[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)[None, None]).reshape(n_users, -1)
  scores_UK, places_UK = lax.top_k(jnp.concatenate([best_UK, scores_UB], axis=1), k)
  texts_UK = jnp.take_along_axis(jnp.concatenate([numbers_UK, texts_UC + firsts[None]], axis=1), places_UK, axis=1)
  return scores_UK[None], texts_UK[None]


@functools.partial(jax.jit, static_argnames='mesh')
def _merge_on(mesh: Mesh, best: Best, texts_BD: jax.Array, firsts: jax.Array, users_UD: jax.Array,
              allowed_UB: jax.Array | None, bonus_B: jax.Array | None) -> Best:
  """`_merge` on every device of a mesh."""
  parts, columns = P(mesh.axis_names), None if allowed_UB is None else P(None, mesh.axis_names)
  return jax.shard_map(_merge, mesh=mesh, out_specs=(parts, parts), in_specs=(
      (parts, parts), parts, parts, P(), columns, None if bonus_B is None else parts))(
          best, texts_BD, firsts, users_UD, allowed_UB, bonus_B)


@functools.partial(jax.jit, static_argnames='mesh')
def _join(mesh: Mesh, best: Best) -> Best:
  """The best of all devices' best, [U, K] each. Later devices hold later texts, so equal scores stay in order."""
  everywhere = NamedSharding(mesh, P())
  scores_UC, texts_UC = (lax.with_sharding_constraint(x, everywhere).swapaxes(0, 1).reshape(x.shape[1], -1) for x in best)
  scores_UK, places_UK = lax.top_k(scores_UC, best[0].shape[2])
  return scores_UK, jnp.take_along_axis(texts_UC, places_UK, axis=1)


class DenseIndex:
  """Exact search of the texts whose embeddings have the highest cosine with a user's, or cosine and bonus.

  The texts are kept on the devices, as rows of length 1, in blocks. A search computes the scores of one block at a time and
  merges the block's best into the best so far, so it needs memory for the scores of a block and of up to 128 users alone
  (16 MB at the default). Each device searches texts of its own.

  Attributes:
    mesh: devices over which the texts lie.
    blocks: float32 [devices * B, D] each; rows past the last text are 0.
  """

  def __init__(self, texts_TD: np.ndarray, *, bonus_T: np.ndarray | None = None, mesh: Mesh | None = None,
               block: int = 32768) -> None:
    """Normalises the texts and puts them on the devices.

    Args:
      texts_TD: float32, embeddings of texts, of any length. Every process gives all of them.
      bonus_T: what is added to each text's cosine; None: nothing.
      mesh: devices to use, along all its axes; default: all of this process for a large catalogue, else one.
      block: texts that a device scores at a time, at most; rounded up to whole groups.

    Raises ValueError for embeddings or a bonus of a wrong shape or that are not finite, and for a block below 1.
    """
    if np.ndim(texts_TD) != 2 or 0 in np.shape(texts_TD):
      raise ValueError(f'Embeddings of texts have shape {np.shape(texts_TD)}; give [texts, D], with at least one text.')
    if bonus_T is not None and (np.shape(bonus_T) != (len(texts_TD),) or not np.isfinite(bonus_T).all()):
      raise ValueError(f'The bonus has shape {np.shape(bonus_T)}; give a finite number for each of {len(texts_TD)} texts.')
    if block < 1:
      raise ValueError(f'block = {block} texts; give at least 1.')
    self.n_texts, self.dim = texts_TD.shape
    devices = jax.local_devices()[:None if self.n_texts >= _LARGE else 1]
    self.mesh = mesh or jax.make_mesh((len(devices),), ('texts',), axis_types=(AxisType.Auto,), devices=devices)
    n_blocks = -(-self.n_texts // (self.mesh.size * block))
    self._rows = -(-self.n_texts // (self.mesh.size * n_blocks * _GROUP)) * _GROUP  # of a block, on a device
    self._own = n_blocks * self._rows  # of a device: texts 0 to _own - 1 lie on the first one
    rows, everything = NamedSharding(self.mesh, P(self.mesh.axis_names)), np.ones((1, self.n_texts), bool)
    self.blocks, self._firsts, self._is_text, self._bonuses = [], [], [], []
    for start in range(0, self._own, self._rows):
      self.blocks.append(jax.make_array_from_callback(
          (self.mesh.size * self._rows, self.dim), rows,
          lambda index, start=start: self._filled(unit(_finite(texts_TD, self._texts(index[0], start), 'text')), axis=0)))
      self._bonuses.append(None if bonus_T is None else jax.make_array_from_callback(
          (self.mesh.size * self._rows,), rows,
          lambda index, start=start: self._filled(np.asarray(bonus_T[self._texts(index[0], start)], np.float32), axis=0)))
      firsts = np.arange(self.mesh.size, dtype=np.int32) * self._own + start
      self._firsts.append(jax.device_put(firsts, rows))
      self._is_text.append(self._columns(everything, start) if firsts[-1] + self._rows > self.n_texts else None)

  def top_k(self, users_UD: np.ndarray, k: int, allowed_UT: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Each user's k best texts, the best first; equal scores in the order of the texts' numbers.

    Args:
      users_UD: float32, embeddings of users, of any length.
      k: how many texts to return.
      allowed_UT: bool, the texts that may come, for each user or (`[T]`) for all of them; default: any.

    Returns:
      scores_UK: float32, cosines, with the bonus; -inf where fewer than k texts are allowed.
      texts_UK: int32, numbers of texts; -1 where fewer than k texts are allowed.

    Raises ValueError for k < 1, and for arrays of a wrong shape or type or that are not finite.
    """
    if k < 1:
      raise ValueError(f'k = {k} texts; give at least 1.')
    if np.ndim(users_UD) != 2 or np.shape(users_UD)[1] != self.dim:
      raise ValueError(f'Embeddings of users have shape {np.shape(users_UD)}; the texts ask for [users, {self.dim}].')
    n_users = len(users_UD)
    if allowed_UT is not None:
      allowed_UT = np.asarray(allowed_UT)
      if allowed_UT.dtype != bool or allowed_UT.shape not in ((self.n_texts,), (n_users, self.n_texts)):
        raise ValueError(f'allowed is {allowed_UT.dtype}{list(allowed_UT.shape)}; give bool[{self.n_texts}] or '
                         f'bool[{n_users}, {self.n_texts}].')
    scores_UK, texts_UK = np.empty((n_users, k), np.float32), np.empty((n_users, k), np.int32)
    for start in range(0, n_users, _USERS[-1]):
      some = slice(start, min(start + _USERS[-1], n_users))
      allowed = allowed_UT if allowed_UT is None or allowed_UT.ndim == 1 else allowed_UT[some]
      found = self._search(unit(_finite(users_UD, some, 'user')), k, allowed)
      scores_UK[some], texts_UK[some] = (np.asarray(x)[:some.stop - start] for x in found)
    return scores_UK, texts_UK

  def _search(self, users_UD: np.ndarray, k: int, allowed_UT: np.ndarray | None) -> Best:
    """`top_k` of at most `_USERS[-1]` users: [U filled up to a size of `_USERS`, K] each."""
    size = next(size for size in _USERS if size >= len(users_UD))
    more = ((0, size - len(users_UD)), (0, 0))
    users_UD = jax.device_put(np.pad(users_UD, more), NamedSharding(self.mesh, P()))
    if allowed_UT is not None:
      allowed_UT = allowed_UT[None] if allowed_UT.ndim == 1 else np.pad(allowed_UT, more)
    shape, parts = (self.mesh.size, size, k), NamedSharding(self.mesh, P(self.mesh.axis_names))
    best = jnp.full(shape, -jnp.inf, device=parts), jnp.full(shape, -1, jnp.int32, device=parts)
    for i, (texts_BD, firsts) in enumerate(zip(self.blocks, self._firsts, strict=True)):
      allowed = self._is_text[i] if allowed_UT is None else self._columns(allowed_UT, i * self._rows)
      best = _merge_on(self.mesh, best, texts_BD, firsts, users_UD, allowed, self._bonuses[i])
    return _join(self.mesh, best)

  def _texts(self, rows: slice, start: int) -> slice:
    """Texts that lie in a device's rows of the block that begins at its text `start`."""
    first = (rows.start or 0) // self._rows * self._own + start
    return slice(min(first, self.n_texts), min(first + self._rows, self.n_texts))

  def _filled(self, part: np.ndarray, axis: int) -> np.ndarray:
    """A device's part of a block, filled up with zeros where it has fewer texts than rows."""
    return np.pad(part, [(0, self._rows - size if a == axis else 0) for a, size in enumerate(part.shape)])

  def _columns(self, allowed_UT: np.ndarray, start: int) -> jax.Array:
    """Which of a block's texts are allowed, on their devices: bool [U, devices * B]."""
    return jax.make_array_from_callback(
        (len(allowed_UT), self.mesh.size * self._rows), NamedSharding(self.mesh, P(None, self.mesh.axis_names)),
        lambda index: self._filled(allowed_UT[:, self._texts(index[1], start)], axis=1))
