"""The popularity baseline: how often each item was bought."""

from collections.abc import Callable

import numpy as np

from calrec_jax.data.histories import Histories


def train_counts(histories: Histories) -> np.ndarray:
  """int64 [I]: events of each item in the train parts."""
  return np.bincount(histories.events[in_train(histories)], minlength=len(histories.item_ids))


def in_train(histories: Histories) -> np.ndarray:
  """bool, like `events`: whether the event is in its history's train part."""
  return histories.among_first(histories.visible('train'))


def scorer(histories: Histories, split: str) -> Callable[[int], np.ndarray]:
  """A function from user to float64 [I], the items' counts: the same for all users and splits."""
  del split  # both splits are ranked with what the train parts hold
  scores_I = train_counts(histories).astype(np.float64)
  return lambda user: scores_I
