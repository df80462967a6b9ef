"""The exact log-probability of given texts after a user's prefix, which is read once (law 7's other side).

Axes: U users, C candidates of each, S tokens of the longest, B = U · C branches, V vocabulary.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.inference.sampling import in_blocks
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoding import Prefix

CANDIDATES = 32  # of a user, read at once
POSITIONS = 256  # whose logits are in memory at once
BUCKET = 16  # texts are padded to multiples of this, so that few programs are compiled


def log_likelihoods(decoder: Decoder, params: Mapping, prefix: Prefix, tokens_UCS: np.ndarray, lengths_UC: np.ndarray, *,
                    eos_id: int) -> np.ndarray:
  """log P(text and its end | prefix), nats, float32 [U, C]: softmax over the whole vocabulary, at temperature 1.

  Args:
    decoder: the model.
    params: the parameters by layer (`decoding.by_layer`).
    prefix: of `decoding.prefill`.
    tokens_UCS: int32, each user's candidates, padded on the right with any token id.
    lengths_UC: int32, tokens of each, without its end. 0: no candidate, whose result is -inf.
    eos_id: the end.
  """
  U, C, S = tokens_UCS.shape
  size = max(min(C, CANDIDATES), 1)
  padding = ((0, 0), (0, -C % size))
  tokens_UCS = np.pad(tokens_UCS, (*padding, (0, -S % BUCKET)))
  lengths_UC = np.pad(lengths_UC, padding)
  of = decoding.branches(np.repeat(np.arange(U), size), U, size)
  found = [_score(decoder, params, prefix, tokens_UCS[:, start:start + size], lengths_UC[:, start:start + size], of, eos_id)
           for start in range(0, tokens_UCS.shape[1], size)]
  found_UC = np.concatenate([np.asarray(block) for block in found], axis=1) if found else np.zeros((U, 0), np.float32)
  return np.where(lengths_UC > 0, found_UC, -np.inf)[:, :C].astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _score(decoder, params, prefix, tokens_UCS, lengths_UC, of, eos_id) -> jax.Array:
  U, C, S = tokens_UCS.shape
  tokens_BS, lengths_B = tokens_UCS.reshape(U * C, S), lengths_UC.reshape(-1)
  hidden_BSD, _ = decoding.extend(decoder, params, tokens_BS, prefix, decoding.empty_suffix(decoder, U * C, S), of, 0)
  # What is read at place i predicts what stands at i + 1; the first token is predicted by the prefix.
  next_BS = jnp.where(jnp.arange(1, S + 1)[None] < lengths_B[:, None], jnp.pad(tokens_BS[:, 1:], ((0, 0), (0, 1))), eos_id)
  logprobs = lambda hidden_RD, tokens_R: in_blocks(
      functools.partial(_logprobs, decoder, params), (hidden_RD, tokens_R), POSITIONS)
  later_BS = logprobs(hidden_BSD.reshape(U * C * S, -1), next_BS.reshape(-1)).reshape(U * C, S)
  first_UV = jax.nn.log_softmax(decoding.logits(decoder, params, prefix.last_UD), axis=-1)
  first_UC = jnp.take_along_axis(first_UV, tokens_UCS[:, :, 0], axis=1)
  is_label_BS = jnp.arange(S)[None] < lengths_B[:, None]
  return first_UC + jnp.sum(jnp.where(is_label_BS, later_BS, 0), axis=1).reshape(U, C)


def _logprobs(decoder, params, rows) -> jax.Array:
  hidden_RD, tokens_R = rows
  logits_RV = decoding.logits(decoder, params, hidden_RD)
  return jnp.take_along_axis(logits_RV, tokens_R[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits_RV, axis=-1)
