"""Metrics of dense retrieval, for validation while a run trains."""

import numpy as np

from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.ranking.dense import better_and_tied
from calrec_jax.training.validation import Embedded


def dense_metrics(embedded: Embedded) -> dict[str, float]:
  """`recall@10` and `ndcg@10`: means over the users, each among all items of the data set that they buy from."""
  found = []
  for source, items_T in embedded.items_T.items():
    of_it = embedded.sources_N == source
    counts = better_and_tied(embedded.users_ND[of_it], embedded.texts_TD, items_T, embedded.targets_N[of_it])
    found.append(expected_metrics(*counts, recall_ks=(10,), ndcg_ks=(10,), mrr_ks=()))
  return {name: float(np.concatenate([metrics[name] for metrics in found]).mean()) for name in ('recall@10', 'ndcg@10')}
