"""Ranking metrics as their expectation over random orders of the tied items, in closed form (design: Truth).

A target with `better` items above it and `tied` other items at its score has, in a random order of the tied ones, each
of the ranks better + 1 ... better + tied + 1 with the same probability. So an expected metric is the metric's mean over
these ranks: a difference of two prefix sums. A ranker gains nothing by scoring everything the same.
"""

from collections.abc import Sequence

import numpy as np

RECALL_KS = (1, 5, 10, 20)
NDCG_KS = (1, 5, 10, 20)
MRR_KS = (1, 5, 10, 20)


def metric_names(recall_ks: Sequence[int] = RECALL_KS, ndcg_ks: Sequence[int] = NDCG_KS, mrr_ks: Sequence[int] = MRR_KS
                 ) -> list[str]:
  """The names of the metrics that `expected_metrics` gives, in its order."""
  return [f'{name}@{k}' for name, ks in (('recall', recall_ks), ('ndcg', ndcg_ks), ('mrr', mrr_ks)) for k in ks] + ['mrr']


def expected_metrics(
  better_U: np.ndarray, tied_U: np.ndarray, *, recall_ks: Sequence[int] = RECALL_KS, ndcg_ks: Sequence[int] = NDCG_KS,
  mrr_ks: Sequence[int] = MRR_KS
) -> dict[str, np.ndarray]:
  """Metrics of U users with one target each: float64 [U] each, in [0, 1].

  Recall@k is 1 if the target's rank is at most k; NDCG@k is 1 / log2(rank + 1) there, else 0; MRR@k is
  1 / rank there, else 0; MRR has no cut-off.

  Args:
    better_U: how many items score strictly above the target.
    tied_U: how many other items score exactly as the target.
    recall_ks: cut-offs, each >= 1.
    ndcg_ks: cut-offs, each >= 1.
    mrr_ks: cut-offs, each >= 1.
  """
  better_U, tied_U = np.asarray(better_U, np.int64), np.asarray(tied_U, np.int64)
  if better_U.shape != tied_U.shape or (better_U < 0).any() or (tied_U < 0).any():
    raise ValueError(f'Counts of shapes {better_U.shape}, {tied_U.shape}: expected equal shapes, no negative count.')
  cuts = [*recall_ks, *ndcg_ks, *mrr_ks]
  if min(cuts, default=1) < 1:
    raise ValueError(f'Cut-offs {cuts}: each must be at least 1.')
  last_U = better_U + tied_U + 1  # the worst rank possible
  last_rank = max(last_U.max(initial=1), *cuts)
  ranks = np.arange(1, last_rank + 1)
  gain_by_rank = {
    **{f'recall@{k}': ranks <= k for k in recall_ks},
    **{f'ndcg@{k}': np.where(ranks <= k, 1 / np.log2(ranks + 1), 0) for k in ndcg_ks},
    **{f'mrr@{k}': np.where(ranks <= k, 1 / ranks, 0) for k in mrr_ks},
    'mrr': 1 / ranks,
  }
  metrics = {}
  for name, gain_R in gain_by_rank.items():
    total_R = np.concatenate([[0], np.cumsum(gain_R, dtype=np.float64)])  # over the first r ranks
    metrics[name] = (total_R[last_U] - total_R[better_U]) / (tied_U + 1)
  return metrics
