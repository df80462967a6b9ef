"""Users who are two: one id with two histories, or one history with two ids."""

from collections.abc import Iterator

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS, Finding, finding, item_label, user_label
from calrec_jax.evaluation.audit.held_out import numbered

SHARED, TWINS = 'users in two data sets', 'one history, two users'
MIN_LENGTH = 5  # events that two histories have to have in common, from the first on
# A bound of the number of such pairs that a Markov chain makes in the whole data set. People are no chain: in a generated store
# it foretold 1e-5 of a pair where there was one. A history copied in real data is below the bound in 97 of 100 cases.
CHANCE = 1e-6
MANY = 0.1  # share of the users from which on equal histories are told of, whatever chance makes
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def check_shared_users(dataset: Histories, other: Histories, where: str) -> Iterator[Finding]:
  """Finds users whose history in another data set differs, although the two have items in common.

  Users of two categories, with nothing in common but their ids, are as they should be.
  """
  users_U = numbered(other.user_ids, dataset.user_ids)
  items_I = numbered(other.item_ids, dataset.item_ids)
  if dataset.fingerprint == other.fingerprint or not (items_I >= 0).any():
    return
  differing = []
  for theirs, ours in enumerate(users_U.tolist()):
    if ours >= 0:
      there, here = items_I[other.history(theirs)], dataset.history(ours)
      if not np.array_equal(there, here) and np.isin(here, there).any():
        differing.append((ours, len(here), len(there)))
  if differing:
    yield finding(
        SHARED, NOTE, f'{len(differing)} of {len(dataset.user_ids)} users of {dataset.name} have another history in '
        f'{other.name} (fingerprint {other.fingerprint[:12]}, named by {where}): what is held out here need not be held out '
        'there.', len(differing),
        (f'{user_label(dataset, user)}: {here} events here, {there} there' for user, here, there in differing))


def check_twins(dataset: Histories) -> Iterator[Finding]:
  """Finds users whose whole history, of `MIN_LENGTH` events or more, is how another user's history begins.

  Where histories are easy to foretell, some are equal by chance. So pairs are told of that users who act on their own would not
  make (`CHANCE`); it is serious where the target of one is in the train part of the other. If more than `MANY` of the users
  are in any such pair, a note tells of all.
  """
  found = _beginnings(dataset)
  if not found:
    return
  chance, n_users = _Chance(dataset), len(dataset.user_ids)
  copied = {user: others for user, others in found.items()
            if n_users * n_users * chance(dataset.history(user), [user, *others]) < CHANCE}
  test_U, train_U = dataset.visible('test'), dataset.visible('train')
  pairs = [(user, other) for user, others in copied.items() for other in others]
  leaks = [(user, other) for user, other in pairs if 2 <= test_U[user] <= train_U[other]]
  rest = [(user, other) for user, other in pairs if (user, other) not in set(leaks)]
  told = f'of {n_users} users of {dataset.name} have a history of {MIN_LENGTH} events or more that another user has too'
  if leaks:
    n_leaked = len({user for user, _ in leaks})
    yield finding(TWINS, SERIOUS, f'{n_leaked} {told}, in the train part, test target included. Chance does not make this: '
                  'take one of the two out.', n_leaked, (_pair(dataset, *pair) for pair in leaks))
  if rest:
    n_twins = len({user for user, _ in rest})
    yield finding(TWINS, NOTE, f'{n_twins} {told}, as a whole or at its beginning. Chance does not make this: they may be one '
                  'person, and are judged twice.', n_twins, (_pair(dataset, *pair) for pair in rest))
  if len(found) > MANY * n_users:
    yield finding(TWINS, NOTE, f'{len(found)} {told}, as a whole or at its beginning: histories of few items, or copies.',
                  len(found), (_pair(dataset, user, others[0]) for user, others in found.items()))


def _pair(dataset: Histories, user: int, other: int) -> str:
  history = dataset.history(user)
  return (f'{user_label(dataset, user)} and {user_label(dataset, other)}: {len(history)} events, the last is '
          f'{item_label(dataset, history[-1])}')


def _beginnings(dataset: Histories) -> dict[int, list[int]]:
  """For each user of whom there is one: the other users whose history begins with the user's."""
  lengths_U = np.diff(dataset.offsets)
  hashes_E = _prefix_hashes(dataset)
  users_E = dataset.event_users
  long_U = np.flatnonzero(lengths_U >= MIN_LENGTH)
  whole_L = hashes_E[dataset.offsets[1:][long_U] - 1]
  order_E = np.argsort(hashes_E, kind='stable')
  first_L, last_L = (np.searchsorted(hashes_E[order_E], whole_L, side=side) for side in ('left', 'right'))
  found = {}
  for user, first, last in zip(long_U.tolist(), first_L.tolist(), last_L.tolist(), strict=True):
    if last - first > 1:
      history = dataset.history(user)
      others = [other for other in users_E[order_E[first:last]].tolist()
                if other != user and np.array_equal(dataset.history(other)[:len(history)], history)]
      if others:
        found[user] = others
  return found


def _prefix_hashes(dataset: Histories) -> np.ndarray:
  """uint64 [E]: a hash of each history up to each of its events."""
  hashes_E = np.zeros(len(dataset.events), np.uint64)
  lengths_U = np.diff(dataset.offsets)
  state_U = np.zeros(len(lengths_U), np.uint64)
  for place in range(int(lengths_U.max(initial=0))):
    users = np.flatnonzero(lengths_U > place)
    events = dataset.offsets[users] + place
    state_U[users] = (state_U[users] ^ (dataset.events[events].astype(np.uint64) + np.uint64(1))) * _HASH_FACTOR  # wraps around
    state_U[users] ^= state_U[users] >> np.uint64(29)
    hashes_E[events] = state_U[users]
  return hashes_E


class _Chance:
  """The probability that a user's history begins with given items: a Markov chain of order one, from the others' histories.

  What was never bought after an item has the probability of its popularity, as if each item had been left once more.
  """

  def __init__(self, dataset: Histories):
    self._dataset = dataset
    self._bought_I = np.bincount(dataset.events, minlength=len(dataset.item_ids))
    self._after: dict[tuple[int, int], int] = {}
    last_E = np.zeros(len(dataset.events), bool)
    last_E[dataset.offsets[1:][np.diff(dataset.offsets) > 0] - 1] = True
    self._left_I = np.bincount(dataset.events[~last_E], minlength=len(dataset.item_ids))
    for pair in zip(dataset.events[:-1][~last_E[:-1]].tolist(), dataset.events[1:][~last_E[:-1]].tolist(), strict=True):
      self._after[pair] = self._after.get(pair, 0) + 1

  def __call__(self, items: np.ndarray, users: list[int]) -> float:
    """Of these items, without what these users bought."""
    theirs, left, bought = {}, {}, {}
    for user in users:
      history = self._dataset.history(user).tolist()
      for item in history:
        bought[item] = bought.get(item, 0) + 1
      for pair in zip(history, history[1:], strict=False):
        theirs[pair] = theirs.get(pair, 0) + 1
        left[pair[0]] = left.get(pair[0], 0) + 1
    n_events = self._bought_I.sum() - sum(bought.values())
    popularity = lambda item: (self._bought_I[item] - bought.get(item, 0) + 1) / (n_events + len(self._bought_I))
    items = items.tolist()
    probability = popularity(items[0])
    for pair in zip(items, items[1:], strict=False):
      times = self._after.get(pair, 0) - theirs.get(pair, 0)
      probability *= (times + popularity(pair[1])) / (self._left_I[pair[0]] - left.get(pair[0], 0) + 1)
    return float(probability)
