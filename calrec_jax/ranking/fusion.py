"""The quasi-round-robin: the scores of many generated texts become one ranking (method: Inference)."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from calrec_jax.errors import UserError

EPSILON = 1 / 5000  # a third-party description of the paper has this value


def check_epsilon(epsilon: float) -> float:
  """Returns `epsilon`; raises UserError unless it is finite and >= 0."""
  if not (math.isfinite(epsilon) and epsilon >= 0):
    raise UserError(f'epsilon = {epsilon}: give a finite number >= 0 (the method: {EPSILON}).')
  return epsilon


def quasi_round_robin(
  scores_GI: np.ndarray, logprobs_G: Sequence[float] | np.ndarray, *, epsilon: float = EPSILON
) -> np.ndarray:
  """Fuses the scores of a user's G texts over I items into one score an item.

  Each text's scores are min-max scaled over the items to [0, 1] and multiplied by exp(epsilon * logprob), the
  text's log-probability in nats; an item's score is its maximum over the texts. As each text's best item gets the
  text's whole weight, the ranking takes first each text's best item, most probable text first.

  Where scaling is undefined (a text scores all items the same), the method is silent about scores above 0. Our
  choice: a text that matches nothing scores 0 everywhere (method), and one that matches every item equally scores 1
  everywhere, since each item is its best match.

  Args:
    scores_GI: scores >= 0. They are handled in float64: the weights of two texts may differ by 1e-6 and less.
    logprobs_G: finite.
    epsilon: >= 0.

  Returns:
    float64 [I]; zeros if there are no texts.
  """
  fused_I = np.zeros(np.shape(scores_GI)[1])
  for scaled_I in _scaled(scores_GI, logprobs_G, epsilon):
    np.maximum(fused_I, scaled_I, out=fused_I)
  return fused_I


def best_texts(scores_GI: np.ndarray, logprobs_G: Sequence[float] | np.ndarray, items: np.ndarray, *,
               epsilon: float = EPSILON) -> np.ndarray:
  """int64, for each of some items: the text that it has its score from, see `quasi_round_robin`; -1 where it has none."""
  best, texts = np.zeros(len(items)), np.full(len(items), -1)
  for text, scaled_I in enumerate(_scaled(scores_GI, logprobs_G, epsilon)):
    texts = np.where(scaled_I[items] > best, text, texts)
    best = np.maximum(best, scaled_I[items])
  return texts


def _scaled(scores_GI: np.ndarray, logprobs_G: Sequence[float] | np.ndarray, epsilon: float) -> Iterator[np.ndarray]:
  """Each text's scaled scores, float64 [I], in an array that the next ones are written into."""
  scores_GI = np.asarray(scores_GI, np.float64)
  weight_G = np.exp(epsilon * np.asarray(logprobs_G, np.float64))
  if scores_GI.shape[:1] != weight_G.shape:
    raise ValueError(f'Scores of {len(scores_GI)} texts, but {weight_G.shape} log-probabilities.')
  scaled_I = np.empty(scores_GI.shape[1])
  for scores_I, weight in zip(scores_GI, weight_G, strict=True):  # text by text: what a text needs stays in the cache
    low, high = scores_I.min(), scores_I.max()
    if low == high:
      scaled_I.fill(low > 0)
    else:
      np.subtract(scores_I, low, out=scaled_I)
      # Division, not a product with the inverse: the best item must get exactly 1, so that equal weights tie.
      scaled_I /= high - low
    scaled_I *= weight
    yield scaled_I
