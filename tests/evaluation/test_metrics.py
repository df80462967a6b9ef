"""Law 9: without ties, metrics are an independent library's; with ties, the mean over all orders of the tied items."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from calrec_jax.evaluation.metrics import expected_metrics, metric_names


def at_rank(rank, name):
  metric, _, cut = name.partition('@')
  if cut and rank > int(cut):
    return 0
  return {'recall': 1, 'ndcg': 1 / math.log2(rank + 1), 'mrr': 1 / rank}[metric]


def mean_over_orders(scores, target, name):
  """The metric's mean over the orders of all items that a sort by score allows; tied blocks are permuted outright."""
  values = []
  for order in itertools.permutations(range(len(scores))):
    if all(scores[order[i]] >= scores[order[i + 1]] for i in range(len(order) - 1)):
      values.append(at_rank(order.index(target) + 1, name))
  return sum(values) / len(values)


def counts(scores, target):
  return sum(score > scores[target] for score in scores), scores.count(scores[target]) - 1


def check_law(metrics_of, scores, target):
  better, tied = counts(scores, target)
  for name, value in metrics_of(better, tied).items():
    assert value == pytest.approx(mean_over_orders(scores, target, name), rel=1e-12, abs=1e-15), name


def ours(better, tied):
  small = expected_metrics([better], [tied], recall_ks=(1, 2, 3, 5, 10), ndcg_ks=(1, 2, 3, 5, 10), mrr_ks=(1, 3, 5))
  return {name: value[0] for name, value in small.items()}


MUTANTS = {
  'optimistic': lambda better, tied: ours(better, 0),
  'pessimistic': lambda better, tied: ours(better + tied, 0),
  'middle rank': lambda better, tied: ours(better + tied // 2, 0),
  'the target is not counted among the tied': lambda better, tied: ours(better, max(tied - 1, 0)),
}

few_levels = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(scores=few_levels, data=st.data())
def test_metrics_are_the_mean_over_all_tie_orders(scores, data):
  check_law(ours, scores, data.draw(st.integers(0, len(scores) - 1)))


@pytest.mark.parametrize('mutant', MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_of_the_tie_rule_is_seen(mutant):
  with pytest.raises(AssertionError):
    check_law(mutant, [1, 2, 1, 0, 1], 0)


def ranked_by_ranx(scores_UI, target_U):
  """Metrics of each user by ranx; needs scores without ties."""
  ranx = pytest.importorskip('ranx')
  names = [name for name in metric_names() if name != 'mrr']
  qrels = ranx.Qrels({f'u{u}': {f'i{target}': 1} for u, target in enumerate(target_U)})
  scores_of = ({f'i{i}': float(score) for i, score in enumerate(scores_I)} for scores_I in scores_UI)
  run = ranx.Run({f'u{u}': scores for u, scores in enumerate(scores_of)})
  found = ranx.evaluate(qrels, run, [*names, 'mrr'], return_mean=False)
  order = [list(run.run).index(f'u{u}') for u in range(len(target_U))]
  return {name: np.asarray(values)[order] for name, values in found.items()}


def check_against_ranx(metrics_of):
  rng = np.random.default_rng(0)
  scores_UI = rng.permuted(np.tile(np.arange(1.0, 31.0), (50, 1)), axis=1)
  target_U = rng.integers(30, size=50)
  score_U1 = scores_UI[np.arange(50), target_U][:, None]
  found = metrics_of((scores_UI > score_U1).sum(1), (scores_UI == score_U1).sum(1) - 1)
  expected = ranked_by_ranx(scores_UI, target_U)
  assert found.keys() == expected.keys()
  for name, values in found.items():
    np.testing.assert_allclose(values, expected[name], rtol=1e-12, err_msg=name)


def test_metrics_without_ties_are_those_of_ranx():
  check_against_ranx(expected_metrics)


def test_ranks_that_begin_at_zero_are_seen_by_ranx():
  with pytest.raises(AssertionError):
    check_against_ranx(lambda better_U, tied_U: expected_metrics(better_U + 1, tied_U))


def test_five_users_by_hand():
  found = expected_metrics([0, 1, 9, 10, 0], [0, 0, 0, 0, 9], recall_ks=(1, 10), ndcg_ks=(10,))
  assert found['recall@1'].tolist() == [1, 0, 0, 0, 0.1]
  assert found['recall@10'].tolist() == pytest.approx([1, 1, 1, 0, 1])
  mean_gain = sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / 10
  assert found['ndcg@10'].tolist() == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(11), 0, mean_gain])
  assert found['mrr'].tolist() == pytest.approx([1, 1 / 2, 1 / 10, 1 / 11, sum(1 / rank for rank in range(1, 11)) / 10])


def test_scoring_all_items_the_same_is_worth_a_random_order():
  found = expected_metrics([0], [999])
  assert found['recall@10'][0] == pytest.approx(10 / 1000)
  assert found['mrr'][0] == pytest.approx(sum(1 / rank for rank in range(1, 1001)) / 1000)


def test_names_are_those_of_the_values():
  assert metric_names() == list(expected_metrics([0], [0]))
  assert {'recall@1', 'recall@10', 'ndcg@1', 'ndcg@10', 'mrr@10', 'mrr'} <= set(metric_names())


def test_no_users():
  assert all(len(values) == 0 for values in expected_metrics([], []).values())


@pytest.mark.parametrize('call', [
  functools.partial(expected_metrics, [-1], [0]), functools.partial(expected_metrics, [0], [-1]),
  functools.partial(expected_metrics, [0, 1], [0]), functools.partial(expected_metrics, [0], [0], recall_ks=(0,)),
])
def test_counts_that_cannot_be(call):
  with pytest.raises(ValueError, match='expected|at least'):
    call()
