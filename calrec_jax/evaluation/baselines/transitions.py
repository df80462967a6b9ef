"""The transitions baseline: what was bought right after the last item, by anyone (a Markov chain of order one)."""

from collections.abc import Callable

import numpy as np
import scipy.sparse

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.baselines import popularity


def train_transitions(histories: Histories) -> scipy.sparse.csr_matrix:
  """int64 [I, I], sparse: how often item j came right after item i within the train parts."""
  events, in_train = histories.events, popularity.in_train(histories)
  user_of = histories.event_users
  # A train part is the head of its history: an event in it and the one before it, of the same user, are both in it.
  after = np.flatnonzero(in_train[1:] & (user_of[1:] == user_of[:-1])) + 1
  n_items = len(histories.item_ids)
  pairs = np.ones(len(after), np.int64), (events[after - 1], events[after])
  counts_II = scipy.sparse.csr_matrix(pairs, (n_items, n_items))
  counts_II.sum_duplicates()
  return counts_II


def scorer(histories: Histories, split: str) -> Callable[[int], np.ndarray]:
  """A function from user to float64 [I]: the transitions from the last item before the target to each item.

  Popularity breaks ties: it is scaled below 1, so it never outweighs a transition. For the test split the last item is
  the validation event: it may be seen, but is not counted.
  """
  counts_II = train_transitions(histories)
  popularity_I = popularity.train_counts(histories)
  tie_breaker_I = popularity_I / (popularity_I.max(initial=0) + 1)

  def scores_I(user: int) -> np.ndarray:
    last = histories.seen(user, split)[-2]
    scores = tie_breaker_I.copy()
    row = slice(*counts_II.indptr[last:last + 2])
    scores[counts_II.indices[row]] += counts_II.data[row]
    return scores

  return scores_I
