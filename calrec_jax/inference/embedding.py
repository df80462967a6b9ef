"""Embeddings of texts read alone, v_T, for dense retrieval (method: Towers).

Axes: T texts, D embed, P padded length.
"""

import functools
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import tqdm

from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder

TOKENS = 4096  # of a batch, padding included
BUCKET = 16  # lengths are padded to multiples of this, so that few programs are compiled


def embed_texts(decoder: Decoder, params: Mapping, texts: Sequence[np.ndarray], *, bos_id: int | None) -> np.ndarray:
  """v_T of each text: the mean of its hidden states, BOS left out; float32 [T, D], not normalised.

  Args:
    decoder: the model.
    params: the parameters by layer (`decoding.by_layer`).
    texts: int32 token ids of each, at least one, without BOS and end.
    bos_id: the token that opens every text in training; None where the vocabulary has none.
  """
  bos = np.asarray([] if bos_id is None else [bos_id], np.int32)
  found_TD = np.zeros((len(texts), decoder.config.embed_dim), np.float32)
  lengths_T = np.asarray([len(text) + len(bos) for text in texts], np.int32)
  padded_T = -(-lengths_T // BUCKET) * BUCKET
  with tqdm.tqdm(total=len(texts), desc='embed', unit=' texts', mininterval=0.5, disable=None, file=sys.stderr) as bar:
    for length in np.unique(padded_T):
      of_length = np.flatnonzero(padded_T == length)
      size = max(TOKENS // int(length), 1)
      for start in range(0, len(of_length), size):
        chosen = of_length[start:start + size]
        tokens_TP = np.zeros((size, length), np.int32)
        for row, text in zip(tokens_TP, chosen, strict=False):
          row[:lengths_T[text]] = np.concatenate([bos, texts[text]])
        lengths = np.pad(lengths_T[chosen], (0, size - len(chosen)), constant_values=1)
        found_TD[chosen] = np.asarray(_embed(decoder, len(bos) > 0, params, tokens_TP, lengths))[:len(chosen)]
        bar.update(len(chosen))
  return found_TD


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(decoder, bos, params, tokens_TP, lengths_T) -> jax.Array:
  return decoding.prefill(decoder, params, tokens_TP, lengths_T, bos=bos).user_UD
