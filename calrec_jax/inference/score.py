"""Scores a text: the log-probability of each token given those before it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.inference.generate import padded
from calrec_jax.inference.loading import Loaded
from calrec_jax.models.decoder import Decoder

_BUCKET = 64  # lengths are padded to multiples of this, so that few programs are compiled


def score_text(loaded: Loaded, text: str) -> dict[str, list]:
  """The tokens of a text and their log-probabilities, nats.

  The text is read as in training: with BOS before it where the vocabulary has one. The first token has no log-probability.

  Returns:
    `token_ids`, `tokens` (their texts) and `logprobs`, of one length; `logprobs[0]` is None.

  Raises:
    UserError: the text has no tokens.
  """
  bos = [] if loaded.vocabulary.bos_id is None else [loaded.vocabulary.bos_id]
  ids = bos + loaded.vocabulary.encode(text)
  if not ids:
    raise UserError('--text: is empty; give a text of at least one letter.')
  logprobs = score(loaded.decoder, loaded.params, ids)
  return {'token_ids': ids, 'tokens': [loaded.vocabulary.token(i) for i in ids],
          'logprobs': [None, *(round(float(value), 6) for value in logprobs)]}


def score(decoder: Decoder, params: Mapping, token_ids: Sequence[int]) -> np.ndarray:
  """log P(token i | tokens before it) for i = 1 …: float32 [L - 1], nats, softmax over the whole vocabulary."""
  tokens_BL, lengths_B = padded([np.asarray(token_ids)], -(-len(token_ids) // _BUCKET) * _BUCKET)
  return np.asarray(token_logprobs(decoder, params, tokens_BL, lengths_B))[0, :len(token_ids) - 1]


@functools.partial(jax.jit, static_argnums=0)
def token_logprobs(decoder: Decoder, params: Any, tokens_BL: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """float32 [B, L - 1], nats: of each token after a row's first. What lies behind a row's length is padding."""
  positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
  segments_BL = (positions_BL < lengths_B[:, None]).astype(jnp.int32)
  hidden_BLD = decoder.apply({'params': params}, tokens_BL, segments_BL, positions_BL)
  logits_BLV = decoder.apply({'params': params}, hidden_BLD[:, :-1], method='logits')
  chosen_BL = jnp.take_along_axis(logits_BLV, tokens_BL[:, 1:, None], axis=-1)[..., 0]
  return chosen_BL - jax.nn.logsumexp(logits_BLV, axis=-1)
