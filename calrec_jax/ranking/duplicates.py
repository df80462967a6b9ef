"""Items of one text: what the text's probability lacks to be an item's."""

import numpy as np

PRIOR = 0.5  # purchases added to each item's, so that one which nobody bought has a share


def log_shares(counts_I: np.ndarray, texts_I: np.ndarray) -> np.ndarray:
  """log P(item | text), float64 [I], nats: each item's share of the purchases of all items of its text; 0 if it is alone.

  Args:
    counts_I: purchases of each item.
    texts_I: the text of each item, a number from 0.
  """
  weights_I = np.asarray(counts_I, np.float64) + PRIOR
  return np.log(weights_I / np.bincount(texts_I, weights_I)[texts_I])
