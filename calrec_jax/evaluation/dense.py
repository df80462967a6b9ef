"""Metrics of dense retrieval, for validation while a run trains."""

import numpy as np

from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.ranking.dense import better_and_tied
from calrec_jax.training.validation import Embedded


def dense_metrics(embedded: Embedded) -> dict[str, float]:
  """`recall@10` and `ndcg@10`: means over the users, each among all items of the data set that they buy from.

  With `_unseen`: among those that the user had not bought before; a target that is none of them comes after all items.
  """
  found: dict[str, list[np.ndarray]] = {}
  for source, items_T in embedded.items_T.items():
    of_it = np.flatnonzero(embedded.sources_N == source)
    spans = embedded.users_ND[of_it], embedded.texts_TD, items_T, embedded.targets_N[of_it]
    better_N, tied_N = better_and_tied(*spans, [embedded.seen_N[user] for user in of_it])
    missed_N = embedded.repeats_N[of_it]
    unseen = np.where(missed_N, items_T.sum() - 1, better_N), np.where(missed_N, 0, tied_N)
    for suffix, counts in (('', better_and_tied(*spans)), ('_unseen', unseen)):
      for name, value_N in expected_metrics(*counts, recall_ks=(10,), ndcg_ks=(10,), mrr_ks=()).items():
        if name.endswith('@10'):
          found.setdefault(name + suffix, []).append(value_N)
  return {name: float(np.concatenate(values).mean()) for name, values in found.items()}
