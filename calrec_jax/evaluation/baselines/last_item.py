"""The last-item baseline: the user buys again what was bought last (method: Inference)."""

from collections.abc import Callable

import numpy as np

from calrec_jax.data.histories import Histories


def scorer(histories: Histories, split: str) -> Callable[[int], np.ndarray]:
  """A function from user to float64 [I]: 1 for the last item before the target, 0 for all others, which tie."""

  def scores_I(user: int) -> np.ndarray:
    one_hot_I = np.zeros(len(histories.item_ids))
    one_hot_I[histories.seen(user, split)[-2]] = 1
    return one_hot_I

  return scores_I
