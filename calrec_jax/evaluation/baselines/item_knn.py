"""The item-KNN baseline: items that were bought by those who bought the user's items (Deshpande & Karypis 2004)."""

from collections.abc import Callable

import numpy as np
import scipy.sparse

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import popularity

# The best of a few for the validation split of Scientific (2018); of neighbours, any number from 100 on is as good.
NEIGHBOURS = 200
LAST_N = 5


def similarities(histories: Histories, neighbours: int = NEIGHBOURS) -> scipy.sparse.csr_matrix:
  """float64 [I, I], sparse: in row i the cosines of item i's nearest neighbours, each in (0, 1].

  An item's vector has a 1 for each user whose train part holds it, however often, and 0 for all others. No item is its own
  neighbour; of equally near items the one with the lower index comes first. An item that is in no train part, or shares no
  user with another, has no neighbours.

  Args:
    histories: the data set.
    neighbours: how many of an item are kept at most.
  """
  if neighbours < 1:
    raise UserError(f'item-KNN: neighbours = {neighbours}; give at least 1.')
  n_users, n_items = len(histories.user_ids), len(histories.item_ids)
  in_train = popularity.in_train(histories)
  user_of = histories.event_users
  bought_UI = scipy.sparse.csr_matrix(
    (np.ones(in_train.sum()), (user_of[in_train], histories.events[in_train])), (n_users, n_items))
  bought_UI.sum_duplicates()
  bought_UI.data[:] = 1
  shared_II = (bought_UI.T @ bought_UI).tocoo()  # users that have both; each item's own on the diagonal
  users_I = np.asarray(bought_UI.sum(0))[0]
  other = shared_II.row != shared_II.col
  item, neighbour, cosine = shared_II.row[other], shared_II.col[other], shared_II.data[other]
  cosine = cosine / np.sqrt(users_I[item] * users_I[neighbour])
  nearest_first = np.lexsort([neighbour, -cosine, item])
  item, neighbour, cosine = (x[nearest_first] for x in (item, neighbour, cosine))
  kept = np.arange(len(item)) - np.searchsorted(item, item) < neighbours  # its place among the item's neighbours
  return scipy.sparse.csr_matrix((cosine[kept], (item[kept], neighbour[kept])), (n_items, n_items))


def scorer(
  histories: Histories, split: str, *, neighbours: int = NEIGHBOURS, last_n: int | None = LAST_N
) -> Callable[[int], np.ndarray]:
  """A function from user to float64 [I]: the sum of an item's similarities to the items of the context.

  An item that is in the context twice counts twice. An item that is a neighbour of none of them scores 0.

  Args:
    histories: the data set.
    split: `test` or `validation`.
    neighbours: how many each item of the context lends a similarity to: see `similarities`.
    last_n: how many events before the target are the context; None: all.
  """
  if last_n is not None and last_n < 1:
    raise UserError(f'item-KNN: last_n = {last_n}; give at least 1, or None for all.')
  similar_II = similarities(histories, neighbours)

  def scores_I(user: int) -> np.ndarray:
    context = histories.seen(user, split)[:-1][-last_n if last_n else None:]
    return np.asarray(similar_II[context].sum(0), np.float64).reshape(-1)

  return scores_I
