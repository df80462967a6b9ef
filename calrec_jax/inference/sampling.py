"""Samples texts from a decoder: one prefill a user, and all samples share the user's prefix cache (method: Inference).

Axes: U users, N samples of each, P padded prefix length, T new tokens, V vocabulary.
"""

import functools
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.models.attention import Step
from calrec_jax.models.decoder import Decoder


@flax.struct.dataclass
class Samples:
  """N texts of each user.

  Attributes:
    tokens_UNT: int32; what follows a text's last token is `eos_id`. An unfinished text fills all T places.
    lengths_UN: int32, tokens before the end.
    logprobs_UN: float32, nats: sum over the tokens and the end, at temperature 1, softmax over the whole vocabulary. An
      unfinished text's sum has no end in it.
    finished_UN: bool, whether the end was sampled.
  """

  tokens_UNT: jax.Array
  lengths_UN: jax.Array
  logprobs_UN: jax.Array
  finished_UN: jax.Array


def sample(decoder: Decoder, params: Mapping, tokens_UP: np.ndarray, lengths_U: np.ndarray, user_keys_U: np.ndarray, *,
           n_samples: int = 32, temperature: float = 0.5, max_new_tokens: int, eos_id: int,
           forbidden: np.ndarray | None = None) -> Samples:
  """Samples `n_samples` continuations of each prefix; compiled once for each (U, P).

  The noise is Gumbel, a function of the user's key, the sample's number and the token's place in the text: the same
  user gets the same texts in any batch, bucket or order, as far as the logits are the same.

  Args:
    decoder: the model.
    params: the parameters, unboxed, a nested mapping of arrays.
    tokens_UP: int32, prefixes from the left, padded on the right with any token id.
    lengths_U: int32, >= 1, each prefix's own length. New tokens continue from there.
    user_keys_U: uint32 [U, 2] or typed keys [U]; should depend on the seed and the user's id only.
    n_samples: N.
    temperature: divides the logits before sampling; 0 takes the most probable token (all samples are equal then).
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
  if not jnp.issubdtype(user_keys_U.dtype, jax.dtypes.prng_key):
    user_keys_U = jax.random.wrap_key_data(jnp.asarray(user_keys_U, jnp.uint32), impl='threefry2x32')
  return _sample(decoder, params, jnp.asarray(tokens_UP, jnp.int32), jnp.asarray(lengths_U, jnp.int32), user_keys_U,
                 jnp.asarray(allowed_V), n_samples, float(temperature), max_new_tokens, eos_id)


def sample_keys(user_keys_U: jax.Array, n_samples: int) -> jax.Array:
  """A key for each sample [U, N]; sample n's does not depend on how many there are."""
  return jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(n_samples)))(user_keys_U)


def choose(logits_UNV: jax.Array, keys_UN: jax.Array, place: jax.Array, allowed_V: jax.Array,
           temperature: float) -> tuple[jax.Array, jax.Array]:
  """A token for each sample, int32 [U, N], and its log-probability at temperature 1, float32 [U, N].

  Gumbel's trick: argmax(logits / temperature + noise) is distributed as softmax(logits / temperature).
  """
  scores_UNV = jnp.where(allowed_V[None, None, :], logits_UNV, -jnp.inf)
  if temperature > 0:
    noise = lambda key: jax.random.gumbel(jax.random.fold_in(key, place), logits_UNV.shape[-1:], jnp.float32)
    scores_UNV = scores_UNV / temperature + jax.vmap(jax.vmap(noise))(keys_UN)
  # The argmax, written out: XLA's CPU compiler puts the noise into the loop of a real argmax, one number at a time.
  is_best_UNV = scores_UNV == jnp.max(scores_UNV, axis=-1, keepdims=True)
  ids_V = jnp.arange(logits_UNV.shape[-1], dtype=jnp.int32)
  tokens_UN = jnp.min(jnp.where(is_best_UNV, ids_V[None, None, :], ids_V[-1]), axis=-1)
  chosen_UN = jnp.take_along_axis(logits_UNV, tokens_UN[..., None], axis=-1)[..., 0]
  return tokens_UN, chosen_UN - jax.nn.logsumexp(logits_UNV, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9))
def _sample(decoder, params, tokens_UP, lengths_U, user_keys_U, allowed_V, n_samples, temperature, max_new_tokens,
            eos_id) -> Samples:
  (U, P), N, T = tokens_UP.shape, n_samples, max_new_tokens
  apply = functools.partial(decoder.apply, {'params': params})
  keys_UN = sample_keys(user_keys_U, N)
  prefix_mask_UP = jnp.arange(P)[None, :] < lengths_U[:, None]
  positions_UP = jnp.broadcast_to(jnp.arange(P)[None, :], (U, P))
  hidden_UPD, prefix = apply(tokens_UP, prefix_mask_UP.astype(jnp.int32), positions_UP, method='prefill')
  last_U1D = jnp.take_along_axis(hidden_UPD, (lengths_U - 1)[:, None, None], axis=1)

  def add(samples: Samples, place, logits_UNV) -> Samples:
    """Samples the token at `place`; a text that has ended stays as it is."""
    tokens_UN, logprobs_UN = choose(logits_UNV, keys_UN, place, allowed_V, temperature)
    open_UN = ~samples.finished_UN
    ends_UN = tokens_UN == eos_id
    return Samples(
        tokens_UNT=samples.tokens_UNT.at[:, :, place].set(jnp.where(open_UN, tokens_UN, eos_id)),
        lengths_UN=samples.lengths_UN + (open_UN & ~ends_UN),
        logprobs_UN=samples.logprobs_UN + jnp.where(open_UN, logprobs_UN, 0),
        finished_UN=samples.finished_UN | ends_UN)

  def goes_on(state):
    place, samples, _ = state
    return (place < T) & ~jnp.all(samples.finished_UN)

  def extend(state):
    """Feeds the token before `place`, then samples the one at `place`."""
    place, samples, suffix = state
    where = Step(jnp.broadcast_to(lengths_U[:, None] + place - 1, (U, N)), prefix_mask_UP, place - 1)
    hidden_UND, suffix = apply(samples.tokens_UNT[:, :, place - 1], prefix, suffix, where, method='step')
    return place + 1, add(samples, place, apply(hidden_UND, method='logits')), suffix

  nothing = Samples(jnp.full((U, N, T), eos_id, jnp.int32), jnp.zeros((U, N), jnp.int32),
                    jnp.zeros((U, N), jnp.float32), jnp.zeros((U, N), bool))
  first_UNV = jnp.broadcast_to(apply(last_U1D, method='logits'), (U, N, decoder.config.vocab_size))
  # The last token is sampled and never fed, so the suffix needs one place less than the text.
  suffix = apply(U, N, max(T - 1, 1), method='empty_suffix')
  return jax.lax.while_loop(goes_on, extend, (jnp.int32(1), add(nothing, 0, first_UNV), suffix))[1]
