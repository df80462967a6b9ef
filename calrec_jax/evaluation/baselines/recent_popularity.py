"""The recent-popularity baseline: how often each item was bought of late."""

from collections.abc import Callable

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import popularity

SHARE = 0.3  # the best of a few for the validation splits of Gift Cards and Magazine Subscriptions (2018)


def is_recent(histories: Histories, share: float = SHARE) -> np.ndarray:
  """bool, like `events`: whether the event is in a train part, and recent.

  With timestamps: in the last `share` of the time from the first to the last event of all train parts, both ends included.

  Without: among the last `share` of the events of its own train part, rounded up, so one at least. Times of different users
  cannot be compared then; what is known is that a train part's last events come right before the events to be predicted.

  Raises UserError unless 0 < `share` <= 1.
  """
  if not 0 < share <= 1:
    raise UserError(f'recent popularity: share = {share}; give a number above 0, up to 1.')
  in_train = popularity.in_train(histories)
  if histories.timestamps is None:
    train_U = histories.visible('train')
    # The rounding takes off what a product such as 0.07 * 100 has too much.
    recent_U = np.ceil(np.round(share * train_U, 9)).astype(np.int64)
    return in_train & ~histories.among_first(train_U - recent_U)
  times = histories.timestamps[in_train]
  if not len(times):
    return in_train
  return in_train & (histories.timestamps >= times.max() - share * (times.max() - times.min()))


def scorer(histories: Histories, split: str, *, share: float = SHARE) -> Callable[[int], np.ndarray]:
  """A function from user to float64 [I], the items' recent counts: the same for all users and splits.

  The count over all of the train parts breaks ties: it is scaled below 1, so it never outweighs a recent event.
  """
  del split  # both splits are ranked with what the train parts hold
  recent_I = np.bincount(histories.events[is_recent(histories, share)], minlength=len(histories.item_ids))
  count_I = popularity.train_counts(histories)
  scores_I = recent_I + count_I / (count_I.max(initial=0) + 1)
  return lambda user: scores_I
