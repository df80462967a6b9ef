"""The order of items: by score, and an order of the tied ones that says nothing of them."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ranked:
  """The best items of one user, downwards.

  Attributes:
    items: int64 [K], their numbers in the catalogue.
    scores: float64 [K]. Items that are not here are below all of these.
  """

  items: np.ndarray
  scores: np.ndarray


def id_hash(each: str) -> bytes:
  """The SHA-256 of an id: a key to sort by that says nothing of what the id names, nor of any result."""
  return hashlib.sha256(each.encode('utf-8', 'surrogatepass')).digest()


def tie_order(item_ids: Sequence[str]) -> np.ndarray:
  """int64 [I]: the item indices in the order in which tied items are listed, that of the SHA-256 of their ids.

  The order of a catalogue may say something of its items (age, category); this one does not. It only orders the lists
  in the rankings: no metric depends on it.
  """
  hashes = [id_hash(item_id) for item_id in item_ids]
  return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.int64)


def top_items(scores_I: np.ndarray, order_I: np.ndarray, n: int) -> np.ndarray:
  """int64 [min(n, I)]: the best items by score, downwards; those with equal scores in the order of `order_I`."""
  shuffled_I = scores_I[order_I]
  n = min(n, len(shuffled_I))
  if not n:
    return np.zeros(0, np.int64)
  bound = np.partition(shuffled_I, -n)[-n]
  above = np.flatnonzero(shuffled_I > bound)
  above = above[np.argsort(-shuffled_I[above], kind='stable')]
  level = np.flatnonzero(shuffled_I == bound)[:n - len(above)]
  return order_I[np.concatenate([above, level])]
