"""What was bought how often: the shares by which a text's score becomes an item's, or a cosine a probability."""

import numpy as np

PRIOR = 0.5  # purchases added to each item's, so that one which nobody bought has a share


def _of_texts(counts_I: np.ndarray, texts_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Purchases with the prior: of each item, and of all items of each text."""
  weights_I = np.asarray(counts_I, np.float64) + PRIOR
  return weights_I, np.bincount(texts_I, weights_I)


def log_item_shares(counts_I: np.ndarray, texts_I: np.ndarray) -> np.ndarray:
  """log P(item | text), float64 [I], nats: each item's share of the purchases of all items of its text; 0 if it is alone.

  Args:
    counts_I: purchases of each item.
    texts_I: the text of each item, a number from 0 without a gap.
  """
  weights_I, weights_T = _of_texts(counts_I, texts_I)
  return np.log(weights_I / weights_T[texts_I])


def log_text_shares(counts_I: np.ndarray, texts_I: np.ndarray) -> np.ndarray:
  """log P(text), float64 [T], nats: each text's share of all purchases. Arguments are those of `log_item_shares`."""
  weights_T = _of_texts(counts_I, texts_I)[1]
  return np.log(weights_T / weights_T.sum())
