"""Beam search and sampling over a catalogue's trie: whatever is written is an item's text.

A node's children are looked up among the logits; no mask of the vocabulary is made. Probabilities are those of the softmax over
the whole vocabulary, so a beam as wide as the catalogue ranks it by exact likelihood (law 7). Filters act inside the search: a
node is entered only where a text below it is allowed.

Axes: U users, W beams of each, N samples of each, K results of each; R = U · W or U · N rows, B branches (what is being read,
one for each user and node), F children of a node at most, T texts, D embed, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from calrec_jax.inference.noise import gumbel, sample_keys
from calrec_jax.inference.sampling import advance, in_blocks, level, stay_in_place
from calrec_jax.inference.trie import Trie
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoding import Prefix

FANOUT = 16  # children are padded to this, or 4, 16, … times as many, so that few programs are compiled
ROWS = 256  # samples whose children's noise is in memory at once


@flax.struct.dataclass
class Nodes:
  """The nodes of a trie on the device, see `trie.Trie`. All have room for more, so that a new catalogue finds its programs."""

  starts_N1: jax.Array
  tokens_E: jax.Array
  lows_N: jax.Array
  highs_N: jax.Array


@dataclasses.dataclass(frozen=True)
class DeviceTrie:
  """A trie on the device, and what the search asks of it on the host.

  Attributes:
    nodes: the nodes.
    n_texts: T.
    longest: tokens of the longest text.
    fanouts_D: the most children of a node at each depth.
    nodes_D: the number of nodes at each depth.
    eos_id: the end.
  """

  nodes: Nodes
  n_texts: int
  longest: int
  fanouts_D: tuple[int, ...]
  nodes_D: tuple[int, ...]
  eos_id: int


@dataclasses.dataclass(frozen=True)
class Found:
  """Texts of each user.

  Attributes:
    texts_UK: int32, numbers of texts; -1 where there is none.
    logprobs_UK: float32, nats: sum over the text's tokens and its end, softmax over the whole vocabulary; -inf where none.
  """

  texts_UK: np.ndarray
  logprobs_UK: np.ndarray


def on_device(trie: Trie) -> DeviceTrie:
  """Copies a trie to the device, once for all searches."""
  size = _roomy(len(trie.lows_N))
  pad = lambda x_N, length: jnp.asarray(np.pad(x_N, (0, length - len(x_N)), mode='edge'))
  nodes = Nodes(pad(trie.starts_N1, size + 1), pad(trie.tokens_E, size), pad(trie.lows_N, size), pad(trie.highs_N, size))
  return DeviceTrie(nodes, trie.n_texts, int(trie.lengths_T.max()), trie.fanouts_D, trie.nodes_D, trie.eos_id)


def beam_search(decoder: Decoder, params: Mapping, prefix: Prefix, trie: DeviceTrie, *, width: int, k: int | None = None,
                allowed_UT: np.ndarray | None = None, eos_id: int) -> Found:
  """Each user's most probable texts that a beam finds, the best first; equal ones in the order of their numbers.

  A step reads a token of every live beam, all at one depth, and keeps the best `width` of their children. A beam that is not
  above the k-th text found cannot lead to a better one, as scores only fall: it ends there, and the search with the last beam.

  Args:
    decoder: the model.
    params: the parameters by layer (`decoding.by_layer`).
    prefix: of `decoding.prefill`.
    trie: the catalogue's, of the decoder's vocabulary.
    width: W; as many as there are texts make the search exact.
    k: K, results; default: `width`.
    allowed_UT: bool, the texts that may come, for each user or (`[T]`) for all of them; default: any.
    eos_id: the end.

  Raises:
    ValueError: `width` or `k` below 1, a filter of a wrong shape or type, or a trie with another end.
  """
  K = width if k is None else k
  if width < 1 or K < 1:
    raise ValueError(f'width = {width}, k = {K}; give at least 1.')
  U = len(prefix.lengths_U)
  counts_UT = _allowed_counts(trie, allowed_UT, U, eos_id)
  reader = _Reader(decoder, params, prefix, trie, width)
  nodes_UW, scores_UW = jnp.zeros((U, 1), jnp.int32), jnp.zeros((U, 1))
  best = jnp.full((U, K), -jnp.inf), jnp.full((U, K), -1, jnp.int32)
  for depth, fanout in enumerate(trie.fanouts_D[:-1]):
    wanted = _padded(min(trie.nodes_D[depth + 1], width), 1, width)
    nodes_UW, tokens_UW, parents_UW, scores_UW, best = _grow(
        decoder, _padded(fanout, FANOUT), wanted, params, trie.nodes, counts_UT, reader.hidden_BD, reader.branch_UW, nodes_UW,
        scores_UW, best)
    new = jax.device_get((nodes_UW, tokens_UW, parents_UW, scores_UW))
    alive_UW = new[3] > -np.inf
    if not alive_UW.any():
      break
    reader.read(*new[:3], alive_UW)
  logprobs_UK, texts_UK = jax.device_get(best)
  return Found(texts_UK, logprobs_UK)


def sample_items(decoder: Decoder, params: Mapping, prefix: Prefix, trie: DeviceTrie, user_keys_U2: np.ndarray, *,
                 n_samples: int = 32, temperature: float = 0.5, allowed_UT: np.ndarray | None = None, eos_id: int) -> Found:
  """Samples texts: each token from the softmax at that temperature over the children that are allowed, and no others.

  The noise is that of `sampling.sample`: a function of the user's key, the sample's number, the token and its place.

  Args:
    decoder: the model.
    params: the parameters by layer (`decoding.by_layer`).
    prefix: of `decoding.prefill`.
    trie: the catalogue's, of the decoder's vocabulary.
    user_keys_U2: uint32, of `noise.user_keys`.
    n_samples: N.
    temperature: divides the logits; 0 takes the most probable child. Log-probabilities are at temperature 1.
    allowed_UT: as in `beam_search`.
    eos_id: the end.

  Returns:
    [U, N], a text for each sample, in the order of the samples' numbers.

  Raises:
    ValueError: as `beam_search` does.
  """
  (U, N), counts_UT = (len(user_keys_U2), n_samples), _allowed_counts(trie, allowed_UT, len(user_keys_U2), eos_id)
  reader = _Reader(decoder, params, prefix, trie, N)
  user_keys_U2 = jnp.asarray(user_keys_U2, jnp.uint32)
  nodes_UN = np.zeros((U, N), np.int32)
  reader.branch_UW = np.repeat(reader.branch_UW, N, axis=1)
  open_UN = np.ones((U, N), bool)
  texts_UN, logprobs_UN = np.full((U, N), -1, np.int32), np.zeros((U, N), np.float32)
  for depth, fanout in enumerate(trie.fanouts_D[:-1]):
    found = _pick(decoder, _padded(fanout, FANOUT), float(temperature), params, trie.nodes, counts_UT, user_keys_U2,
                  np.int32(depth), reader.hidden_BD, reader.branch_UW, nodes_UN)
    nodes_UN, tokens_UN, new_logprobs_UN, lows_UN = jax.device_get(found)
    logprobs_UN += np.where(open_UN, new_logprobs_UN, 0)
    ended_UN = open_UN & (tokens_UN == eos_id)
    texts_UN[ended_UN] = lows_UN[ended_UN]
    open_UN &= ~ended_UN & (logprobs_UN > -np.inf)  # -inf at the root: nothing is allowed
    if not open_UN.any():
      break
    reader.read(nodes_UN, tokens_UN, np.broadcast_to(np.arange(N), (U, N)), open_UN)
  return Found(texts_UN, logprobs_UN)


class _Reader:
  """Reads a token of every beam or sample; those of one user at one node are one branch.

  Attributes:
    hidden_BD: what the next token of each branch is predicted from.
    branch_UW: int32, the branch of each beam or sample; any, where it has none.
  """

  def __init__(self, decoder: Decoder, params: Mapping, prefix: Prefix, trie: DeviceTrie, width: int):
    self.hidden_BD, self.branch_UW = prefix.last_UD, np.arange(len(prefix.lengths_U), dtype=np.int32)[:, None]
    self._model, self._prefix, self._suffix, self._width, self._longest = (decoder, params), prefix, None, width, trie.longest
    self._index = 0

  def read(self, nodes_UW: np.ndarray, tokens_UW: np.ndarray, parents_UW: np.ndarray, alive_UW: np.ndarray) -> None:
    """Reads `tokens_UW`, which lead to `nodes_UW`, where `alive_UW`; `parents_UW`: the beams that these go on from."""
    users, beams = np.nonzero(alive_UW)
    (U, _), nodes = alive_UW.shape, nodes_UW[alive_UW]
    _, firsts, branch = np.unique(users * (np.int64(nodes.max()) + 1) + nodes, return_index=True, return_inverse=True)
    users_B, tokens_B = users[firsts], tokens_UW[alive_UW][firsts]
    parents_B = self.branch_UW[users, parents_UW[users, beams]][firsts]
    order_B = stay_in_place(parents_B)
    place_B = np.argsort(order_B)
    size = level(len(users_B), U * self._width)
    if self._index == 0:
      self._suffix = decoding.empty_suffix(self._model[0], size, self._longest)
    self.hidden_BD, self._suffix = advance(
        *self._model, self._prefix, self._suffix, parents_B[order_B] if self._index else None, tokens_B[order_B],
        users_B[order_B], self._width, self._index)
    self._index += 1
    self.branch_UW = np.zeros(alive_UW.shape, np.int32)
    self.branch_UW[alive_UW] = place_B[branch]


def _roomy(size: int) -> int:
  """A size that is at most a quarter larger, of which there are few."""
  step = max(2**(size.bit_length() - 3), 64)
  return -(-size // step) * step


def _padded(needed: int, least: int, most: int | None = None) -> int:
  """The first of `least` times 1, 4, 16, … that is enough, but no more than `most`."""
  size = least
  while size < needed:
    size *= 4
  return size if most is None else min(size, most)


def _allowed_counts(trie: DeviceTrie, allowed_UT: np.ndarray | None, n_users: int, eos_id: int) -> jax.Array | None:
  """How many texts are allowed before each one, int32 [U or 1, T + 1 and room for more]; None: all. Checks what is given."""
  if eos_id != trie.eos_id:
    raise ValueError(f'The trie ends texts with token {trie.eos_id}, the decoder with {eos_id}: build it with its vocabulary.')
  if allowed_UT is None:
    return None
  allowed_UT = np.asarray(allowed_UT)
  if allowed_UT.dtype != bool or allowed_UT.shape not in ((trie.n_texts,), (n_users, trie.n_texts)):
    raise ValueError(f'allowed is {allowed_UT.dtype}{list(allowed_UT.shape)}; give bool[{trie.n_texts}] or '
                     f'bool[{n_users}, {trie.n_texts}].')
  allowed_UT = np.atleast_2d(allowed_UT)
  return _running_sums(np.pad(allowed_UT, ((0, 0), (1, _roomy(trie.n_texts) - trie.n_texts))))


@jax.jit
def _running_sums(allowed_UT: jax.Array) -> jax.Array:
  return jnp.cumsum(allowed_UT, axis=1, dtype=jnp.int32)


def _children(nodes: Nodes, fanout: int, logits_BV: jax.Array, norm_B: jax.Array, counts_UT: jax.Array | None,
              rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The children of nodes, their tokens and log-probabilities (-inf: no child, or not allowed), [R, F] each.

  `rows`: each one's user, branch and node.
  """
  users_R, branch_R, nodes_R = rows
  edges_RF = nodes.starts_N1[nodes_R][:, None] + jnp.arange(fanout, dtype=jnp.int32)[None]
  is_child_RF = edges_RF < nodes.starts_N1[nodes_R + 1][:, None]
  edges_RF = jnp.where(is_child_RF, edges_RF, 0)
  children_RF = edges_RF + 1
  if counts_UT is not None:
    users_R1 = (users_R % len(counts_UT))[:, None]
    is_child_RF &= counts_UT[users_R1, nodes.highs_N[children_RF]] > counts_UT[users_R1, nodes.lows_N[children_RF]]
  tokens_RF = nodes.tokens_E[edges_RF]
  logprobs_RF = logits_BV[branch_R[:, None], tokens_RF] - norm_B[branch_R][:, None]
  return children_RF, tokens_RF, jnp.where(is_child_RF, logprobs_RF, -jnp.inf)


def _rows(branch_UW: jax.Array, nodes_UW: jax.Array) -> tuple[jax.Array, ...]:
  users_UW = jnp.broadcast_to(jnp.arange(len(nodes_UW), dtype=jnp.int32)[:, None], nodes_UW.shape)
  return users_UW.reshape(-1), branch_UW.reshape(-1), nodes_UW.reshape(-1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _grow(decoder, fanout, width, params, nodes, counts_UT, hidden_BD, branch_UW, nodes_UW, scores_UW, best):
  """The best children of all beams: nodes, tokens, parents and scores (-inf: no beam), [U, W] each; and the best texts."""
  logits_BV = decoding.logits(decoder, params, hidden_BD)
  norm_B = jax.nn.logsumexp(logits_BV, axis=-1)
  (U, _), rows = nodes_UW.shape, _rows(branch_UW, nodes_UW)
  children_RF, tokens_RF, logprobs_RF = _children(nodes, fanout, logits_BV, norm_B, counts_UT, rows)
  scores_RF = scores_UW.reshape(-1, 1) + logprobs_RF
  # The end is a node's first child, and has no children.
  first_R = children_RF[:, 0]
  ends_R = nodes.starts_N1[first_R] == nodes.starts_N1[first_R + 1]
  best = _merge(*best, jnp.where(ends_R, scores_RF[:, 0], -jnp.inf).reshape(U, -1), nodes.lows_N[first_R].reshape(U, -1))
  scores_RF = scores_RF.at[:, 0].set(jnp.where(ends_R, -jnp.inf, scores_RF[:, 0]))
  by_user = lambda x_RF: x_RF.reshape(U, -1)
  scores_UW, places_UW = lax.top_k(by_user(scores_RF), min(width, scores_RF.size // U))
  scores_UW = jnp.where(scores_UW > best[0][:, -1:], scores_UW, -jnp.inf)
  chosen = lambda x_RF: jnp.take_along_axis(by_user(x_RF), places_UW, axis=1)
  return chosen(children_RF), chosen(tokens_RF), places_UW // fanout, scores_UW, best


def _merge(best_UK: jax.Array, texts_UK: jax.Array, scores_UW: jax.Array, texts_UW: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The best k of both, the best first, equal scores in the order of the texts."""
  texts_UW = jnp.where(scores_UW > -jnp.inf, texts_UW, -1)
  both = lambda *parts: jnp.concatenate(parts, axis=1)
  costs, texts = lax.sort((both(-best_UK, -scores_UW), both(texts_UK, texts_UW)), num_keys=2)
  return -costs[:, :best_UK.shape[1]], texts[:, :best_UK.shape[1]]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pick(decoder, fanout, temperature, params, nodes, counts_UT, user_keys_U2, place, hidden_BD, branch_UN, nodes_UN):
  """A child for each sample: its node, token, log-probability and first text, [U, N] each."""
  logits_BV = decoding.logits(decoder, params, hidden_BD)
  norm_B = jax.nn.logsumexp(logits_BV, axis=-1)
  keys_R = sample_keys(user_keys_U2, nodes_UN.shape[1]).reshape(-1)

  def of_samples(rows):
    keys_R, rows = rows
    children_RF, tokens_RF, logprobs_RF = _children(nodes, fanout, logits_BV, norm_B, counts_UT, rows)
    scores_RF = logprobs_RF / temperature + gumbel(keys_R, place, tokens_RF) if temperature > 0 else logprobs_RF
    chosen_R1 = jnp.argmax(scores_RF, axis=1, keepdims=True)
    found = (jnp.take_along_axis(x_RF, chosen_R1, axis=1)[:, 0] for x_RF in (children_RF, tokens_RF, logprobs_RF))
    children_R, tokens_R, logprobs_R = found
    return children_R, tokens_R, logprobs_R, nodes.lows_N[children_R]

  found = in_blocks(of_samples, (keys_R, _rows(branch_UN, nodes_UN)), ROWS)
  return jax.tree.map(lambda x_R: x_R.reshape(nodes_UN.shape), found)
