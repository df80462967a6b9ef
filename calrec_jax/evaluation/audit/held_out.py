"""The events that a data set holds out: targets of its validation and its test split."""

import dataclasses

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.protocols import MIN_HISTORY

SPLITS = ('test', 'validation')


@dataclasses.dataclass(frozen=True)
class Targets:
  """The targets of one split, one a user.

  Attributes:
    users_H: int64, user numbers.
    places_H: int64, where in `events` the targets are.
    items_H: int32, the items.
  """

  users_H: np.ndarray
  places_H: np.ndarray
  items_H: np.ndarray


def targets(histories: Histories, split: str) -> Targets:
  """Of the users that a protocol may judge: three events or more, and a context before the target."""
  seen_U = histories.visible(split)
  users_H = np.flatnonzero((np.diff(histories.offsets) >= MIN_HISTORY) & (seen_U >= 2))
  places_H = histories.offsets[users_H] + seen_U[users_H] - 1
  return Targets(users_H, places_H, histories.events[places_H])


def numbered(ids: list[str], known: list[str]) -> np.ndarray:
  """int64, the number that each id has among the known ones; -1 if none."""
  number_of = {each: number for number, each in enumerate(known)}
  return np.array([number_of.get(each, -1) for each in ids], np.int64)
