"""What is counted of purchase histories: length, popularity, repeats, ties in time, the range of time."""

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.description import distributions
from calrec_jax.evaluation.audit.id_order import greater_later, neighbours

TOP_PERCENTS = (1, 5, 10, 20, 50)
MOST_PERIODS = 30


def part(count: int, total: int) -> dict[str, float]:
  """A `count`, and its `share` of all; 0 of nothing."""
  return {'count': int(count), 'share': int(count) / max(int(total), 1)}


def sizes(dataset: Histories) -> dict:
  """`users`, `items`, `events`, `pairs` (users with an item that they bought), `density` (pairs / (users · items))."""
  n_users, n_items, n_pairs = len(dataset.user_ids), len(dataset.item_ids), int(_distinct_items(dataset).sum())
  return {'users': n_users, 'items': n_items, 'events': len(dataset.events), 'pairs': n_pairs,
          'density': n_pairs / (n_users * n_items)}


def length(dataset: Histories) -> dict:
  """Events of a history: `quantiles` and `histogram` over users."""
  lengths_U = np.diff(dataset.offsets)
  return {'quantiles': distributions.quantiles(lengths_U), 'histogram': distributions.histogram(lengths_U)}


def popularity(dataset: Histories) -> dict:
  """Events of an item: `quantiles`, `histogram` and `gini` over all items, those without events too; and the share of events
  that the most popular items have together, `top`: `percent` of the items, how many these are, their events, the share."""
  events_I = item_events(dataset)
  shares = [(percent, distributions.top_share(events_I, percent)) for percent in TOP_PERCENTS]
  return {'quantiles': distributions.quantiles(events_I), 'histogram': distributions.histogram(events_I),
          'gini': distributions.gini(events_I),
          'top': [{'percent': percent, 'items': top['n'], 'events': top['sum'], 'share': top['share']}
                  for percent, top in shares]}


def item_events(dataset: Histories) -> np.ndarray:
  """int64 [I]: events of each item."""
  return np.bincount(dataset.events, minlength=len(dataset.item_ids))


def repeats(dataset: Histories) -> dict:
  """Events whose item is that of the event before (`consecutive`), or of any earlier one of their user (`any`); the `users` who
  have one of the latter; those whose last event is such a one (`last_consecutive`, `last_any`)."""
  lengths_U, n_users = np.diff(dataset.offsets), len(dataset.user_ids)
  places_P, last_P = neighbours(dataset)
  same_P = dataset.events[places_P] == dataset.events[places_P - 1]
  first_E = np.zeros(len(dataset.events), bool)  # of its user and item
  first_E[np.unique(_pairs(dataset), return_index=True)[1]] = True
  last_any = ~first_E[dataset.offsets[1:][lengths_U > 0] - 1]
  return {'consecutive': part(same_P.sum(), len(dataset.events)), 'any': part((~first_E).sum(), len(dataset.events)),
          'users': part((_distinct_items(dataset) < lengths_U).sum(), n_users),
          'last_consecutive': part((same_P & last_P).sum(), n_users), 'last_any': part(last_any.sum(), n_users)}


def _pairs(dataset: Histories) -> np.ndarray:
  """int64, like `events`: a number for each pair of user and item."""
  return dataset.event_users * len(dataset.item_ids) + dataset.events


def _distinct_items(dataset: Histories) -> np.ndarray:
  """int64 [U]: how many items each user has bought."""
  return np.bincount(np.unique(_pairs(dataset)) // len(dataset.item_ids), minlength=len(dataset.user_ids))


def ties(dataset: Histories) -> dict:
  """Neighbours in a history that share their time, and whether their order follows the items' ids.

  `events`: those that share their time with the one before; `last_two`: users whose last two events share it; both None
  without timestamps. `greater_id`: of pairs of neighbours with different items, in how many (`count`) of all (`pairs`) the
  later item has the greater id, where chance makes half of them: among `tied` neighbours and `tied_last_two` (None without
  timestamps), and among all users' `last_two` events.
  """
  places_P, last_P = neighbours(dataset)
  greater = {'tied': None, 'tied_last_two': None, 'last_two': _greater(dataset, places_P[last_P])}
  if dataset.timestamps is None:
    return {'events': None, 'last_two': None, 'greater_id': greater}
  tied_P = dataset.timestamps[places_P] == dataset.timestamps[places_P - 1]
  greater |= {'tied': _greater(dataset, places_P[tied_P]), 'tied_last_two': _greater(dataset, places_P[tied_P & last_P])}
  return {'events': part(tied_P.sum(), len(dataset.events)),
          'last_two': part((tied_P & last_P).sum(), len(dataset.user_ids)), 'greater_id': greater}


def _greater(dataset: Histories, places_P: np.ndarray) -> dict:
  _, greater_P = greater_later(dataset, places_P)
  return {'pairs': len(greater_P), **part(greater_P.sum(), len(greater_P))}


def time(dataset: Histories) -> dict | None:
  """`first` and `last` time in UTC, and the events of each period between, `periods`: days, months, years or more years.

  Each period has its first day, month or year as `from`, the last as `to`, and a `count`. None without timestamps.
  """
  if dataset.timestamps is None or not len(dataset.timestamps):
    return None
  times_E = dataset.timestamps.astype('datetime64[s]')
  first, last = times_E.min(), times_E.max()
  unit = next((unit for unit in 'DM' if (last.astype(f'M8[{unit}]') - first.astype(f'M8[{unit}]')).astype(int) < MOST_PERIODS),
              'Y')
  numbers_E = times_E.astype(f'datetime64[{unit}]').astype(np.int64)
  base = -1970 if unit == 'Y' else 0  # decades begin at years such as 1990
  low, high = int(numbers_E.min()) - base, int(numbers_E.max()) - base
  width = next(width for width in distributions.round_numbers((1, 2, 5)) if high // width - low // width < MOST_PERIODS)
  counts = np.bincount((numbers_E - base) // width - low // width)
  starts = [(low // width + place) * width + base for place in range(len(counts))]
  name = lambda number: str(np.datetime64(number, unit))
  return {'first': f'{first}Z', 'last': f'{last}Z',
          'periods': [{'from': name(start), 'to': name(start + width - 1), 'count': count}
                      for start, count in zip(starts, counts.tolist(), strict=True)]}
