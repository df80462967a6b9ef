"""Order that follows the items' ids where time does not tell it."""

from collections.abc import Iterator

import numpy as np
import scipy.stats

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS, Finding, finding, item_label, user_label

CHECK = 'order of ids'
P_VALUE = 1e-6
LOW, HIGH = 0.45, 0.55  # shares between these are let pass
NEAR = 0.01  # ids are near that are this share of the catalogue apart, or less


def check_id_order(dataset: Histories) -> Iterator[Finding]:
  """Finds pairs of neighbours of which the later item has the greater id, as a text, too often or too seldom for chance.

  Looked at are each user's last two events, as the test target is the later one, and all neighbours. Where there are
  timestamps, only those of one time: there the order is somebody's choice. Where there are none, all last two are; newer items
  often have greater ids, and that is no leak. So that is a note, and has the share among near ids too, where age says little.
  """
  places, is_last = neighbours(dataset)
  if dataset.timestamps is None:
    yield from _finding(dataset, places[is_last], "users' last two events")
    return
  tied = dataset.timestamps[places] == dataset.timestamps[places - 1]
  yield from _finding(dataset, places[tied], 'pairs of neighbours of one time')
  yield from _finding(dataset, places[tied & is_last], "users' last two events of one time")


def neighbours(dataset: Histories) -> tuple[np.ndarray, np.ndarray]:
  """(the places of events that follow one of the same user: int64 [P], whether each is its user's last: bool [P])."""
  places = np.flatnonzero(np.diff(dataset.event_users) == 0) + 1
  return places, np.isin(places, dataset.offsets[1:] - 1)


def greater_later(dataset: Histories, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(`places` whose item is another than the one before: int64 [P], whether the later item has the greater id: bool [P])."""
  ranks_I = _id_ranks(dataset)
  earlier, later = ranks_I[dataset.events[places - 1]], ranks_I[dataset.events[places]]
  return places[earlier != later], (later > earlier)[earlier != later]


def _id_ranks(dataset: Histories) -> np.ndarray:
  """int64 [I], each item's place in the order of ids."""
  ranks_I = np.empty(len(dataset.item_ids), np.int64)
  ranks_I[sorted(range(len(ranks_I)), key=dataset.item_ids.__getitem__)] = np.arange(len(ranks_I))
  return ranks_I


def _finding(dataset: Histories, places: np.ndarray, what: str) -> Iterator[Finding]:
  places_P, greater_P = greater_later(dataset, places)
  if not len(places_P):
    return
  share = greater_P.mean()
  p_value = scipy.stats.binomtest(int(greater_P.sum()), len(greater_P)).pvalue
  if LOW <= share <= HIGH or p_value >= P_VALUE:
    return
  advice = 'Prepare the data with `--ties hashed`.'
  if dataset.timestamps is None:
    ranks_I = _id_ranks(dataset)
    near_P = np.abs(ranks_I[dataset.events[places_P]] - ranks_I[dataset.events[places_P - 1]]) <= NEAR * len(ranks_I)
    near = f' ({greater_P[near_P].mean():.1%} of the {near_P.sum()} with near ids)' if near_P.any() else ''
    advice = ('There are no timestamps: it may be that events of one time were sorted by id, or that newer items have greater '
              f'ids, which shows little where ids are near{near}. If it is the former, prepare the data from its source, '
              'with `--ties hashed`.')
  probability = f'p = {p_value:.0e}' if p_value > 1e-300 else 'p < 1e-300'
  follows_P = greater_P if share > 0.5 else ~greater_P
  users_E = dataset.event_users
  yield finding(
      CHECK, NOTE if dataset.timestamps is None else SERIOUS,
      f'in {share:.1%} of {len(greater_P)} {what} in {dataset.name} the later item has the greater id, where '
      f'chance makes 50 % ({probability}): the order can tell of the target. {advice}',
      follows_P.sum(), (f'{user_label(dataset, users_E[place])}: {item_label(dataset, dataset.events[place - 1])}, then '
                        f'{item_label(dataset, dataset.events[place])}' for place in places_P[follows_P].tolist()))
