"""Samples texts: all of a user's samples go on from the one cache of the user's prefix (method: Inference).

Samples that have been the same so far are one branch: it is computed once, until they part. A sample that has ended has no
branch. So the work is that of the different texts, and the samples are what they would be one by one.

Axes: U users, N samples of each, R = U · N samples in all, B branches, T new tokens, D embed, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.inference.noise import gumbel, sample_keys
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoding import Caches, Prefix

SAMPLES = 32  # whose scores are in memory at once
MOVED = 8  # suffixes copied at once
LEVELS = 4  # numbers of branches, in parts of all samples, that programs are compiled for


@dataclasses.dataclass(frozen=True)
class Samples:
  """N texts of each user.

  Attributes:
    tokens_UNT: int32; what follows a text's last token is `eos_id`. An unfinished text fills all T places.
    lengths_UN: int32, tokens before the end.
    logprobs_UNT: float32, nats: of each token and of the end, at temperature 1, softmax over the whole vocabulary; 0 after it.
    finished_UN: bool, whether the end was sampled.
  """

  tokens_UNT: np.ndarray
  lengths_UN: np.ndarray
  logprobs_UNT: np.ndarray
  finished_UN: np.ndarray

  @property
  def logprobs_UN(self) -> np.ndarray:
    """float32, of whole texts; an unfinished text's has no end in it."""
    return self.logprobs_UNT.sum(axis=-1)


def sample(decoder: Decoder, params: Mapping, prefix: Prefix, user_keys_U2: np.ndarray, *, n_samples: int = 32,
           temperature: float = 0.5, top_p: float = 1.0, max_new_tokens: int, eos_id: int,
           forbidden: np.ndarray | None = None) -> Samples:
  """Samples `n_samples` continuations of each prefix.

  The noise is Gumbel, a function of the user's key, the sample's number, the token and its place in the text: the same user
  gets the same texts in any batch, bucket or order, as far as the logits are the same.

  Args:
    decoder: the model.
    params: the parameters by layer (`decoding.by_layer`).
    prefix: of `decoding.prefill`.
    user_keys_U2: uint32 [U, 2]; should depend on the seed and the user's id only (`noise.user_keys`).
    n_samples: N.
    temperature: divides the logits before sampling; 0 takes the most probable token (all samples are equal then).
    top_p: only the most probable tokens are sampled that have this probability together, at that temperature; 1: all.
    max_new_tokens: T, the end included.
    eos_id: the end; it is never an input.
    forbidden: bool [V], ids that are never sampled. They count in the softmax of the log-probabilities, as in training.

  Raises:
    ValueError: the end is forbidden, or the mask does not fit the decoder's vocabulary.
  """
  vocab_size = decoder.config.vocab_size
  allowed_V = np.ones(vocab_size, bool) if forbidden is None else ~np.asarray(forbidden, bool)
  if allowed_V.shape != (vocab_size,) or not allowed_V[eos_id]:
    raise ValueError(f'forbidden: shape {allowed_V.shape}, expected ({vocab_size},) with eos_id {eos_id} allowed.')
  (U, N, T), V = (len(user_keys_U2), n_samples, max_new_tokens), vocab_size
  tokens_UNT = np.full((U, N, T), eos_id, np.int32)
  logprobs_UNT, finished_UN = np.zeros((U, N, T), np.float32), np.zeros((U, N), bool)
  draw = functools.partial(_draw, decoder, params, jnp.asarray(user_keys_U2, jnp.uint32), jnp.asarray(allowed_V), N,
                           float(temperature), float(top_p))
  users_B, branch_UN = np.arange(U), np.repeat(np.arange(U)[:, None], N, axis=1)
  hidden_BD, suffix = prefix.last_UD, None
  for place in range(T):
    new_UN, new_logprobs_UN = map(np.asarray, draw(hidden_BD, branch_UN, np.int32(place)))
    open_UN = ~finished_UN
    tokens_UNT[:, :, place] = np.where(open_UN, new_UN, eos_id)
    logprobs_UNT[:, :, place] = np.where(open_UN, new_logprobs_UN, 0)
    finished_UN |= new_UN == eos_id
    if place == T - 1 or finished_UN.all():
      break
    parted, branch_O = np.unique(branch_UN[~finished_UN] * V + new_UN[~finished_UN], return_inverse=True)
    order_B = stay_in_place(parted // V)
    parents_B, tokens_B = parted[order_B] // V, parted[order_B] % V
    branch_UN = np.zeros((U, N), np.int64)  # any, where a text has ended
    branch_UN[~finished_UN] = np.argsort(order_B)[branch_O]
    users_B = users_B[parents_B]
    if place == 0:  # the last token is sampled and never fed: the suffix needs one place less than the text
      suffix = decoding.empty_suffix(decoder, level(len(users_B), U * N), T - 1)
    hidden_BD, suffix = advance(decoder, params, prefix, suffix, parents_B if place else None, tokens_B, users_B, N, place)
  lengths_UN = np.where(finished_UN, np.argmax(tokens_UNT == eos_id, axis=-1), T).astype(np.int32)
  return Samples(tokens_UNT, lengths_UN, logprobs_UNT, finished_UN)


def level(needed: int, most: int) -> int:
  """How many branches a program has that holds so many: one of `LEVELS` parts of the most there can be."""
  step = -(-most // LEVELS)
  return min(-(-needed // step) * step, most)


def advance(decoder: Decoder, params: Mapping, prefix: Prefix, suffix: Caches, parents_B: np.ndarray | None,
            tokens_B: np.ndarray, users_B: np.ndarray, width: int, index: int) -> tuple[jax.Array, Caches]:
  """Branches go on from their parents, or from the prefix (None), by a token each.

  Args:
    suffix: the parents' suffixes; no longer to be used.
    parents_B: int [B].
    tokens_B: int [B], the tokens that are read now.
    users_B: int [B].
    width: the most branches that a user may have.
    index: how many tokens the parents' suffixes have.

  Returns:
    Hidden states and suffixes, of at least B branches: what follows the first B is padding.
  """
  U, n_branches = len(prefix.lengths_U), len(users_B)
  size = level(n_branches, U * width)
  pad = lambda x_B: np.pad(x_B, (0, size - n_branches)).astype(np.int32)
  if parents_B is not None:
    moved = np.flatnonzero(parents_B != np.arange(n_branches))
    if size != len(suffix[0].keys) or np.isin(parents_B[moved], moved).any():
      suffix = _take(suffix, pad(parents_B))
    else:  # most branches stand where their parents did: the others' suffixes are copied to theirs, in place
      for start in range(0, len(moved), MOVED):
        places = np.pad(moved[start:start + MOVED], (0, max(start + MOVED - len(moved), 0)), mode='edge')
        suffix = _move(suffix, parents_B[places], places)
  widest = size if U == 1 else level(int(np.bincount(users_B).max()), width)
  of = decoding.branches(users_B, U, widest)
  of = decoding.Branches(of.members_UW, pad(of.places_B))  # padding goes with the first user's first branch
  return read_tokens(decoder, params, pad(tokens_B), prefix, suffix, of, np.int32(index))


def stay_in_place(parents_B: np.ndarray) -> np.ndarray:
  """An order of the branches, int [B], in which one child of each parent stands where the parent did, if that is below B.

  Then only the other ones' suffixes have to be moved, and into places that nothing is read from.
  """
  n_branches = len(parents_B)
  parents, firsts = np.unique(parents_B, return_index=True)
  order_B = np.full(n_branches, -1)
  order_B[parents[parents < n_branches]] = firsts[parents < n_branches]
  order_B[order_B < 0] = np.setdiff1d(np.arange(n_branches), order_B)
  return order_B


@jax.jit
def _take(suffix: Caches, parents_B: jax.Array) -> Caches:
  return jax.tree.map(lambda x: x[parents_B], suffix)


@functools.partial(jax.jit, donate_argnums=0)
def _move(suffix: Caches, parents_M: jax.Array, places_M: jax.Array) -> Caches:
  return jax.tree.map(lambda x: x.at[places_M].set(x[parents_M]), suffix)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def read_tokens(decoder: Decoder, params: Mapping, tokens_B: jax.Array, prefix: Prefix, suffix: Caches,
                of: decoding.Branches, index: jax.Array) -> tuple[jax.Array, Caches]:
  """A step of decoding: a token more for each branch, which all have `index` so far; hidden states [B, D], and suffixes."""
  hidden_B1D, suffix = decoding.extend(decoder, params, tokens_B[:, None], prefix, suffix, of, index)
  return hidden_B1D[:, 0], suffix


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _draw(decoder, params, user_keys_U2, allowed_V, n_samples, temperature, top_p, hidden_BD, branch_UN, place):
  """The next token of each sample, and its log-probability; both [U, N]."""
  logits_BV = decoding.logits(decoder, params, hidden_BD)
  norm_B = jax.nn.logsumexp(logits_BV, axis=-1)
  keys_R = sample_keys(user_keys_U2, n_samples).reshape(-1)

  def of_samples(rows):
    branch_R, keys_R = rows
    tokens_R, chosen_R = choose(logits_BV[branch_R], keys_R, place, allowed_V, temperature, top_p)
    return tokens_R, chosen_R - norm_B[branch_R]

  found = in_blocks(of_samples, (branch_UN.reshape(-1), keys_R), SAMPLES)
  return jax.tree.map(lambda x_R: x_R.reshape(branch_UN.shape), found)


def choose(logits_RV: jax.Array, keys_R: jax.Array, place: jax.Array, allowed_V: jax.Array, temperature: float,
           top_p: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """A token for each row of logits, int32 [R], and its logit, float32 [R].

  Gumbel's trick: argmax(logits / temperature + noise) is distributed as softmax(logits / temperature).
  """
  scores_RV = jnp.where(allowed_V[None], logits_RV, -jnp.inf)
  ids_1V = jnp.arange(logits_RV.shape[-1], dtype=jnp.int32)[None]
  if temperature > 0:
    scores_RV = scores_RV / temperature
    if top_p < 1:
      scores_RV = jnp.where(scores_RV >= nucleus_bound(scores_RV, top_p), scores_RV, -jnp.inf)
    scores_RV = scores_RV + gumbel(keys_R, place, ids_1V)
  # The argmax, written out: XLA's CPU compiler puts the noise into the loop of a real argmax, one number at a time.
  is_best_RV = scores_RV == jnp.max(scores_RV, axis=-1, keepdims=True)
  tokens_R = jnp.min(jnp.where(is_best_RV, ids_1V, ids_1V[0, -1]), axis=-1)
  chosen_R = jnp.take_along_axis(logits_RV, tokens_R[:, None], axis=-1)[:, 0]
  return tokens_R, chosen_R


def nucleus_bound(scores_RV: jax.Array, top_p: float) -> jax.Array:
  """float32 [R, 1]: the highest bound whose scores at or above it have a probability of at least `top_p` together.

  It is the last score of the nucleus (Holtzman et al. 2020), found by halving an interval: no sort of the vocabulary.
  """
  highest_R1 = jnp.max(scores_RV, axis=-1, keepdims=True)
  weights_RV = jnp.exp(scores_RV - highest_R1)
  needed_R1 = top_p * jnp.sum(weights_RV, axis=-1, keepdims=True)

  def halve(_, bounds):
    low_R1, high_R1 = bounds
    middle_R1 = (low_R1 + high_R1) / 2
    enough_R1 = jnp.sum(jnp.where(weights_RV >= middle_R1, weights_RV, 0), axis=-1, keepdims=True) >= needed_R1
    return jnp.where(enough_R1, middle_R1, low_R1), jnp.where(enough_R1, high_R1, middle_R1)

  low_R1, _ = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(highest_R1), jnp.ones_like(highest_R1)))
  # The lowest weight at or above it, as a score: no rounding of a logarithm decides which scores are in.
  return jnp.min(jnp.where(weights_RV >= low_R1, scores_RV, jnp.inf), axis=-1, keepdims=True)


def in_blocks(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
  """`function` of a tree of arrays [R, ...], so many rows at a time; its results lie in the same order."""
  n_rows = len(jax.tree.leaves(rows)[0])
  size = min(size, n_rows)
  pad = -n_rows % size
  blocks = jax.tree.map(lambda x: jnp.concatenate([x, x[:pad]]).reshape(-1, size, *x.shape[1:]), rows)
  if n_rows + pad == size:
    return function(rows)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n_rows], jax.lax.map(function, blocks))
