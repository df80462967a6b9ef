"""Law 8, second half: the quasi-round-robin is the ten-line brute force, and ranks as its name says."""

import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from calrec_jax.errors import UserError
from calrec_jax.ranking.fusion import check_epsilon, quasi_round_robin

SCORES_GI = np.array([
  [0.0, 2.0, 8.0, 4.0, 1.0],
  [9.0, 3.0, 3.0, 6.0, 3.0],
  [0.0, 0.0, 0.0, 0.0, 0.0],  # matches nothing
  [5.0, 5.0, 5.0, 5.0, 9.0],
])
LOGPROBS_G = np.array([-2.0, -0.5, -0.1, -400.0])


def brute_force(scores_GI, logprobs_G, epsilon=1 / 5000):
  fused = []
  for item in range(len(scores_GI[0])):
    best = 0.0
    for scores_I, logprob in zip(scores_GI, logprobs_G, strict=True):
      low, high = min(scores_I), max(scores_I)
      scaled = (scores_I[item] - low) / (high - low) if high > low else float(high > 0)
      best = max(best, scaled * math.exp(epsilon * logprob))
    fused.append(best)
  return np.array(fused)


def check_law(fuse):
  np.testing.assert_allclose(fuse(SCORES_GI, LOGPROBS_G), brute_force(SCORES_GI, LOGPROBS_G), rtol=1e-12, atol=0)


def scaled(scores_GI, axis=1):
  low, high = scores_GI.min(axis, keepdims=True), scores_GI.max(axis, keepdims=True)
  return (scores_GI - low) / np.where(high > low, high - low, 1)


WEIGHT_G1 = np.exp(LOGPROBS_G / 5000)[:, None]
MUTANTS = {
  'sum over texts': lambda scores, _: (scaled(scores) * WEIGHT_G1).sum(0),
  'mean over texts': lambda scores, _: (scaled(scores) * WEIGHT_G1).mean(0),
  'no scaling': lambda scores, _: (scores * WEIGHT_G1).max(0),
  'scaling by the maximum': lambda scores, _: (scores / scores.max(1, keepdims=True, initial=1) * WEIGHT_G1).max(0),
  'scaling over the texts': lambda scores, _: (scaled(scores, axis=0) * WEIGHT_G1).max(0),
  'log-probability ignored': lambda scores, _: scaled(scores).max(0),
  'another epsilon': lambda scores, logprobs: quasi_round_robin(scores, logprobs, epsilon=1 / 500),
  'log-probability added': lambda scores, logprobs: (scaled(scores) + logprobs[:, None] / 5000).max(0),
  'float32': lambda scores, logprobs: quasi_round_robin(scores, logprobs).astype(np.float32),
}


def test_the_quasi_round_robin_is_the_brute_force():
  check_law(quasi_round_robin)


@pytest.mark.parametrize('mutant', MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_of_the_quasi_round_robin_is_seen(mutant):
  with pytest.raises(AssertionError):
    check_law(mutant)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 8))
scores = shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=st.integers(0, 6).map(lambda n: n / 3)))


@hypothesis.settings(deadline=None)
@hypothesis.given(scores_GI=scores, data=st.data())
def test_any_quasi_round_robin_is_the_brute_force(scores_GI, data):
  n_texts = len(scores_GI)
  logprobs_G = data.draw(hnp.arrays(np.float64, n_texts, elements=st.floats(-1e4, 0)))
  epsilon = data.draw(st.sampled_from([0, 1 / 5000, 0.1]))
  fused_I = quasi_round_robin(scores_GI, logprobs_G, epsilon=epsilon)
  np.testing.assert_allclose(fused_I, brute_force(scores_GI, logprobs_G, epsilon), rtol=1e-12, atol=0)
  order = data.draw(st.permutations(range(n_texts)))
  np.testing.assert_array_equal(quasi_round_robin(scores_GI[order], logprobs_G[order], epsilon=epsilon), fused_I)


def test_the_scores_are_left_as_they_are():
  scores_GI, logprobs_G = SCORES_GI.copy(), LOGPROBS_G.copy()
  quasi_round_robin(scores_GI, logprobs_G)
  np.testing.assert_array_equal(scores_GI, SCORES_GI)
  np.testing.assert_array_equal(logprobs_G, LOGPROBS_G)


def test_each_texts_best_item_comes_first_most_probable_text_first():
  rng = np.random.default_rng(0)
  for _ in range(20):
    scores_GI = rng.random((6, 40)) * rng.integers(1, 9, (6, 1))
    best_G = rng.choice(40, 6, replace=False)
    scores_GI[np.arange(6), best_G] = 10
    logprobs_G = -30 * rng.random(6)
    order_I = np.argsort(-quasi_round_robin(scores_GI, logprobs_G), kind='stable')
    rest = order_I[6:]
    assert order_I[:6].tolist() == best_G[np.argsort(-logprobs_G)].tolist()
    by_score_I = brute_force(scores_GI, logprobs_G)
    assert (np.diff(by_score_I[rest]) <= 0).all()


def test_texts_that_differ_by_a_millionth_are_told_apart():
  fused_I = quasi_round_robin(np.array([[1.0, 0, 0], [0, 1.0, 0]]), [-20.0, -20.000001])
  assert fused_I[0] > fused_I[1] > fused_I[2] == 0


def test_equally_probable_texts_best_items_tie_exactly():
  fused_I = quasi_round_robin(np.array([[0.1, 0.7, 0.3], [0.2, 0.1, 0.9]]), [-7.3, -7.3])
  assert fused_I[1] == fused_I[2] > fused_I[0]


def test_texts_that_match_nothing_or_everything():
  np.testing.assert_array_equal(quasi_round_robin(np.zeros((1, 3)), [-0.1]), 0)
  np.testing.assert_array_equal(quasi_round_robin(np.full((1, 3), 4.0), [0.0]), 1)
  assert quasi_round_robin(np.zeros((0, 3)), []).tolist() == [0, 0, 0]
  assert quasi_round_robin(np.array([[5.0]]), [0.0]).tolist() == [1]


def test_scores_without_their_log_probabilities():
  with pytest.raises(ValueError, match='2 texts'):
    quasi_round_robin(np.zeros((2, 3)), [-1.0])


@pytest.mark.parametrize('epsilon', [-1e-9, math.nan, math.inf])
def test_epsilon_out_of_range(epsilon):
  with pytest.raises(UserError, match='epsilon'):
    check_epsilon(epsilon)
