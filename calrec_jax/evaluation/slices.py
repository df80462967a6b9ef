"""Groups of users, by their history and their target, whose metrics are also reported apart."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.baselines.popularity import train_counts

LENGTHS = (1, 3, 5, 10, 20)  # where the groups of history lengths begin
COUNTS = (0, 1, 5, 20, 100)  # and those of the target's events in the train parts
CATEGORIES = 10
ONE = 0.9  # a level at which so many items have one category does not divide them
METRICS = ('recall@10', 'ndcg@10')


def groups(histories: Histories, split: str, users: Sequence[int]) -> dict[str, list[str]]:
  """The group of each user, in the order of `users`, for each way to divide them.

  `history`: items before the target. `target popularity`: its events in the train parts. `target`: `cold` if it has none there,
  else `warm`. `repeat`: whether the target is in the context. `category`: of the target, at the broadest level that divides the
  catalogue; the ten most frequent, the rest are `other`. `price`: whether the target's is known.
  """
  counts_I, categories_I = train_counts(histories), broad_categories([item['category'] for item in histories.items])
  seen = [histories.seen(user, split) for user in users]
  targets = [int(events[-1]) for events in seen]
  frequent = [name for name, _ in Counter(categories_I[target] for target in targets).most_common(CATEGORIES)]
  return {
    'history': [_range(len(events) - 1, LENGTHS) for events in seen],
    'target popularity': [_range(int(counts_I[target]), COUNTS) for target in targets],
    'target': ['warm' if counts_I[target] else 'cold' for target in targets],
    'repeat': ['repeat' if target in events[:-1] else 'new' for events, target in zip(seen, targets, strict=True)],
    'category': [categories_I[target] if categories_I[target] in frequent else 'other' for target in targets],
    'price': ['known' if histories.items[target]['price'] else 'unknown' for target in targets],
  }


def broad_categories(categories: Sequence[str]) -> list[str]:
  """Of categories like 'Office, Paper, Labels' the first level that is not the same for 9 in 10; `unknown` for none."""
  levels = [[level.strip() for level in category.split(',')] if category else [] for category in categories]
  known = [each for each in levels if each]
  at = lambda depth: [each[min(depth, len(each) - 1)] for each in known]
  depth = next((depth for depth in range(max(map(len, known), default=0))
                if Counter(at(depth)).most_common(1)[0][1] < ONE * len(known)), 0)
  return [each[min(depth, len(each) - 1)] if each else 'unknown' for each in levels]


def sliced(groups_of: dict[str, list[str]], values: dict[str, dict[str, np.ndarray]]) -> dict:
  """{way: {group: {'users': n, 'methods': {method: {metric: mean}}}}}, of `METRICS`; groups in their natural order.

  Args:
    groups_of: as `groups` gives them.
    values: {method: {metric: float64 [U]}}.
  """
  found = {}
  for way, groups_U in groups_of.items():
    names = np.array(groups_U)
    found[way] = {}
    for name in sorted(set(groups_U), key=_natural):
      of_it = names == name
      found[way][name] = {'users': int(of_it.sum()), 'methods': {
        method: {metric: float(value_U[metric][of_it].mean()) for metric in METRICS} for method, value_U in values.items()}}
  return found


def _range(value: int, begins: Sequence[int]) -> str:
  place = int(np.searchsorted(begins, value, side='right')) - 1
  begin, end = begins[place], begins[place + 1] - 1 if place + 1 < len(begins) else None
  return f'{begin}+' if end is None else str(begin) if end == begin else f'{begin}-{end}'


def _natural(name: str) -> tuple:
  head = name.rstrip('+').split('-')[0]
  return (0, int(head), '') if head.isdigit() else (1, name in ('other', 'unknown'), name)
