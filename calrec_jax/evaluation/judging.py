"""Ranks the candidates of each user with each method, and measures all of them alike (design: Truth)."""

import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import tqdm

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation import significance
from calrec_jax.evaluation.baselines.popularity import train_counts
from calrec_jax.evaluation.beyond_accuracy import beyond_accuracy
from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.evaluation.protocols import Protocol
from calrec_jax.evaluation.rankings import write_rankings
from calrec_jax.evaluation.slices import groups, sliced

Scorer = Callable[[int], np.ndarray]  # from a user's number to float64 [I]
INTERVALS = ('recall@1', 'recall@10', 'ndcg@10', 'mrr')
RESAMPLES = 1000  # for the intervals of a table; `calrec compare` takes ten times as many


def judge(folder: pathlib.Path, scorers: Mapping[str, Scorer], histories: Histories, protocol: Protocol) -> dict:
  """Writes `rankings-<method>.jsonl.gz` of each method into an existing folder; returns what was measured, as JSON.

  Returns:
    `protocol`, `data`, `users`, `too_short_users`, `items`; `methods`: the mean of each metric; `intervals`: the 95 % interval
    of some, by a bootstrap over users; `lists`: see `beyond_accuracy`; `slices`: see `slices.sliced`.

  Raises:
    UserError: nobody to evaluate, or a data set of another split.
  """
  rules = protocol.rules(histories)
  users, n_short = protocol.users(histories)
  seen = [histories.seen(user, protocol.split) for user in users]
  targets_U, contexts = np.array([events[-1] for events in seen]), [events[:-1] for events in seen]
  counts_I, values, lists = train_counts(histories), {}, {}
  for name, scorer in scorers.items():
    better_U, tied_U, tops_UK = write_rankings(
      folder / f'rankings-{name}.jsonl.gz', scorer,
      users=tqdm.tqdm(users, desc=f'rank: {name}', unit=' users', mininterval=0.5), user_ids=histories.user_ids,
      targets=targets_U.tolist(), item_ids=histories.item_ids, candidates=lambda user: protocol.candidates(histories, user))
    values[name] = expected_metrics(better_U, tied_U)
    lists[name] = beyond_accuracy(tops_UK, contexts=contexts, targets_U=targets_U, counts_I=counts_I)
  return {
    'protocol': rules,
    'data': {'name': histories.name, 'fingerprint': histories.fingerprint},
    'users': len(users),
    'too_short_users': n_short,
    'items': len(histories.item_ids),
    'methods': {name: {metric: float(value_U.mean()) for metric, value_U in found.items()} for name, found in values.items()},
    'intervals': _intervals(values),
    'lists': lists,
    'slices': sliced(groups(histories, protocol.split, users), values),
  }


def _intervals(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict:
  """{method: {metric: [low, high]}}."""
  if not values:
    return {}
  table_MUK = np.stack([np.stack([found[metric] for metric in INTERVALS], axis=-1) for found in values.values()])
  resampled = significance.bootstrap(table_MUK, resamples=RESAMPLES)
  ends = {name: np.stack(resampled.interval(number), axis=-1).tolist() for number, name in enumerate(values)}
  return {name: dict(zip(INTERVALS, pairs, strict=True)) for name, pairs in ends.items()}
