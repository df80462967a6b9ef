"""Test targets whose text stands in the prompt already, under another item's id."""

import re
from collections.abc import Iterator

import numpy as np

from calrec_jax.data.histories import FIELDS, Histories
from calrec_jax.evaluation.audit.findings import NOTE, Finding, finding, item_label, user_label
from calrec_jax.evaluation.audit.held_out import targets

CHECK = 'targets whose text is in the prompt'
NEAR = 0.9  # Jaccard similarity of two items' sets of words, from which on their texts are nearly equal
# Of the test targets, from which on it is told. Shops sell one thing under two ids: of the targets of a generated store, up to
# five in a thousand are such.
MOST = 0.01


def check_texts(dataset: Histories, most: float = MOST) -> Iterator[Finding]:
  """A note where more than `most` of the test targets have the text, or nearly so, of another item before them in the history.

  Two texts are nearly equal where the Jaccard similarity of their sets of words, of all attributes, lower-cased, is at least
  `NEAR`. Repeats of the target itself are counted apart.
  """
  held = targets(dataset, 'test')
  contexts, places = _context_pairs(dataset, held.places_H, held.users_H)
  same = contexts == held.items_H[places]
  repeated_H = np.zeros(len(held.users_H), bool)
  repeated_H[places[same]] = True
  contexts, places = contexts[~same], places[~same]
  equal, near = _similar(dataset, held.items_H[places], contexts)
  equal_H, near_H = np.zeros((2, len(held.users_H)), bool)
  equal_H[places[equal]], near_H[places[near]] = True, True
  alike_H = equal_H | near_H
  if not len(alike_H) or alike_H.mean() <= most:
    return
  either = np.flatnonzero(equal | near)
  users, firsts = np.unique(places[either], return_index=True)
  yield finding(
      CHECK, NOTE, f'{alike_H.sum()} of {len(alike_H)} test targets of {dataset.name} ({alike_H.mean():.1%}) have an item of '
      f'another id before them with the same text ({equal_H.sum()}) or nearly the same ({(near_H & ~equal_H).sum()}; Jaccard '
      f'similarity of their words {NEAR} or more): it can be copied from the prompt. Repeats of the target itself: '
      f'{repeated_H.sum()}.', alike_H.sum(),
      (f'{user_label(dataset, held.users_H[place])}: {item_label(dataset, held.items_H[place])} after '
       f'{item_label(dataset, contexts[pair])}' for place, pair in zip(users.tolist(), either[firsts].tolist(), strict=True)))


def _context_pairs(dataset: Histories, places_H: np.ndarray, users_H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(items before the targets, of which target: its place in H), each of them int64 [pairs]."""
  target_U = np.full(len(dataset.user_ids), -1)
  target_U[users_H] = np.arange(len(users_H))
  users_E = dataset.event_users
  end_U = np.zeros(len(dataset.user_ids), np.int64)
  end_U[users_H] = places_H
  before = np.arange(len(dataset.events)) < end_U[users_E]
  return dataset.events[before].astype(np.int64), target_U[users_E[before]]


def _similar(dataset: Histories, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(whether the texts are equal, whether they are nearly equal), bool [pairs], of items with any attribute known."""
  texts = ['\n'.join(item[field] for field in FIELDS) for item in dataset.items]
  words = [frozenset(re.findall(r'\w+', text.lower())) for text in texts]
  number_of: dict[str, int] = {}
  text_I = np.array([number_of.setdefault(text, len(number_of)) for text in texts], np.int64)
  sizes_I = np.array([len(each) for each in words], np.int64)
  known = (sizes_I[left] > 0) & (sizes_I[right] > 0)
  equal = known & (text_I[left] == text_I[right])
  smaller, larger = np.minimum(sizes_I[left], sizes_I[right]), np.maximum(sizes_I[left], sizes_I[right])
  near = known & ~equal & (smaller >= NEAR * larger)  # else they cannot be
  for pair in np.flatnonzero(near).tolist():
    common = len(words[left[pair]] & words[right[pair]])
    near[pair] = common >= NEAR * (sizes_I[left[pair]] + sizes_I[right[pair]] - common)
  return equal, near
