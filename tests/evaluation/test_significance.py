"""The bootstrap: agrees with scipy and with the normal approximation, covers, pairs, and is the same on every machine."""

import numpy as np
import pytest
import scipy.stats

from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.evaluation.significance import Difference, bootstrap, holm, over_seeds, p_value, percentile_interval


def random_metrics(seed, n_users, n_methods=1, shift=0.0, noise=0.3):
  """[M, U, K]: metrics of methods that rank a user's target near each other; each method is better by `shift`."""
  rng = np.random.default_rng(seed)
  hardness_U = rng.normal(size=n_users)
  ranks_MU = [np.exp(2 + hardness_U + noise * rng.normal(size=n_users) - shift * method) for method in range(n_methods)]
  return np.stack([np.stack(list(expected_metrics(rank_U.astype(int), np.zeros(n_users)).values()), 1) for rank_U in ranks_MU])


def test_intervals_are_those_of_scipy():
  values_MUK = random_metrics(0, 300)
  low_K, high_K = bootstrap(values_MUK, resamples=10_000).interval(0)
  for k in range(values_MUK.shape[2]):
    value_U = values_MUK[0, :, k]
    found = scipy.stats.bootstrap((value_U,), np.mean, n_resamples=10_000, method='percentile', rng=np.random.default_rng(1))
    # An end's own deviation is 0.027 errors at 10,000 resamples. There are two of them, and recall moves in steps of 1 / 300.
    noise = 0.1 * found.standard_error + 1.01 / 300 * (len(np.unique(value_U)) == 2)
    assert low_K[k] == pytest.approx(found.confidence_interval.low, abs=noise)
    assert high_K[k] == pytest.approx(found.confidence_interval.high, abs=noise)


def test_intervals_of_many_users_are_those_of_the_normal_distribution():
  values_MUK = random_metrics(1, 20_000)
  found = bootstrap(values_MUK, resamples=4_000)
  error_K = values_MUK[0].std(axis=0) / np.sqrt(20_000)
  low_K, high_K = found.interval(0)
  np.testing.assert_allclose((low_K - found.mean_MK[0]) / error_K, -1.96, atol=0.12)
  np.testing.assert_allclose((high_K - found.mean_MK[0]) / error_K, 1.96, atol=0.12)
  np.testing.assert_allclose(found.resampled_RMK[:, 0].std(axis=0), error_K, rtol=0.05)


def coverage(interval_of, n_samples=400, n_users=100):
  """How often the interval of a sample's mean holds the mean of the population, reciprocal ranks."""
  rng, covered = np.random.default_rng(2), 0
  population = 1 / np.arange(1, 21)
  for sample in range(n_samples):
    low, high = interval_of(rng.choice(population, size=(1, n_users, 1)), sample)
    covered += low <= population.mean() <= high
  return covered / n_samples


def test_intervals_cover_the_truth_as_often_as_they_say():
  real = lambda values_MUK, seed: bootstrap(values_MUK, resamples=400, seed=seed).interval(0)
  assert coverage(real) == pytest.approx(0.94, abs=0.03)  # percentile intervals of skewed values cover slightly less than 95 %
  narrow = lambda values_MUK, seed: percentile_interval(
    bootstrap(values_MUK, resamples=400, seed=seed).resampled_RMK[:, 0], level=0.8)
  assert coverage(narrow) < 0.86


def test_means_are_those_of_the_users_drawn():
  values_MUK = random_metrics(3, 50, n_methods=2)
  found = bootstrap(values_MUK, resamples=20, seed=5)
  rng = np.random.default_rng(5)
  for mean_MK in found.resampled_RMK:
    np.testing.assert_allclose(mean_MK, values_MUK[:, rng.integers(50, size=50)].mean(axis=1), rtol=0, atol=1e-13)
  np.testing.assert_array_equal(found.mean_MK, values_MUK.mean(axis=1))


@pytest.mark.parametrize('n_users', [1, 7, 1000])
def test_the_same_bits_whatever_the_block_and_whatever_else_is_in_the_table(n_users):
  values_MUK = random_metrics(4, n_users, n_methods=3)
  whole_RMK = bootstrap(values_MUK, resamples=101, seed=1).resampled_RMK
  for n_rows in (1, 2, 50, 101):
    found = bootstrap(values_MUK, resamples=101, seed=1, block_bytes=8 * n_users * n_rows)
    np.testing.assert_array_equal(found.resampled_RMK, whole_RMK)
  alone = bootstrap(values_MUK[1:2], resamples=101, seed=1).resampled_RMK
  np.testing.assert_array_equal(alone[:, 0], whole_RMK[:, 1])
  np.testing.assert_array_equal(bootstrap(values_MUK[::-1], resamples=101, seed=1).resampled_RMK, whole_RMK[:, ::-1])
  assert n_users == 1 or (bootstrap(values_MUK, resamples=101, seed=2).resampled_RMK != whole_RMK).any()


def test_a_method_is_exactly_as_good_as_itself():
  values_MUK = random_metrics(6, 200)
  difference = bootstrap(np.concatenate([values_MUK, values_MUK]), resamples=500).difference(0, 1)
  for zero_K in (difference.mean_K, difference.low_K, difference.high_K):
    assert (zero_K == 0).all()
  assert (difference.p_K == 1).all() and (holm(difference.p_K) == 1).all()


def test_gains_that_cancel_are_exactly_zero():
  a, b = 1 / np.log2(3), 1 / 7
  found = bootstrap(np.array([[[a], [b]], [[b], [a]]]), resamples=1000)
  assert len(np.unique(found.resampled_RMK[:, 0] - found.resampled_RMK[:, 1])) == 3  # two of one user, or one of each: 0
  assert found.difference(0, 1).p_K.tolist() == [1]


def check_pairing(difference_of):
  """Two methods that agree about who is hard: their difference is far surer than either's mean."""
  values_MUK = random_metrics(7, 400, n_methods=2, shift=0.05, noise=0.1)
  difference = difference_of(values_MUK)
  error_K = np.std(values_MUK[0] - values_MUK[1], axis=0) / np.sqrt(400)
  np.testing.assert_allclose(difference.high_K - difference.low_K, 2 * 1.96 * error_K, rtol=0.1)
  assert (difference.high_K - difference.low_K < 0.7 * np.subtract(*bootstrap(values_MUK).interval(0)[::-1])).all()


def test_a_difference_is_taken_over_the_same_users():
  check_pairing(lambda values_MUK: bootstrap(values_MUK).difference(1, 0))


def test_unpaired_resamples_are_found_out():
  def unpaired(values_MUK):
    one, other = (bootstrap(values_MUK[m:m + 1], seed=m) for m in (1, 0))
    difference_RK = one.resampled_RMK[:, 0] - other.resampled_RMK[:, 0]
    return Difference(one.mean_MK[0] - other.mean_MK[0], *percentile_interval(difference_RK), p_value(difference_RK))

  with pytest.raises(AssertionError):
    check_pairing(unpaired)


@pytest.mark.parametrize('shift', [0.0, 0.02, 0.04])
def test_p_is_near_that_of_the_t_test(shift):
  values_MUK = random_metrics(8, 1000, n_methods=2, shift=shift)
  p_K = bootstrap(values_MUK, resamples=20_000).difference(1, 0).p_K
  expected_K = scipy.stats.ttest_rel(values_MUK[1], values_MUK[0]).pvalue
  np.testing.assert_allclose(p_K, expected_K, atol=0.03, rtol=0.25)


def test_p_turns_with_the_sign_and_is_never_zero():
  found = bootstrap(random_metrics(9, 200, n_methods=2, shift=1.0), resamples=999)
  there, back = found.difference(1, 0), found.difference(0, 1)
  np.testing.assert_array_equal(there.p_K, back.p_K)
  np.testing.assert_allclose(there.low_K, -back.high_K, rtol=1e-14)
  assert there.p_K[-1] == pytest.approx(2 / 1000) and there.low_K[-1] > 0


def test_p_and_interval_agree():
  found = bootstrap(random_metrics(10, 150, n_methods=9, shift=0.05), resamples=999)
  differences = [found.difference(m, 0) for m in range(1, 9)]
  p, low, high = (np.concatenate([getattr(each, name) for each in differences]) for name in ('p_K', 'low_K', 'high_K'))
  apart = (low > 0) | (high < 0)
  assert apart[p < 0.05].all() and not apart[p > 0.053].any()
  assert 10 < apart.sum() < len(apart) - 10  # both happen


def test_p_by_hand():
  difference_RK = np.array([[-1, 0.5], [0, 1], [2, 2], [3, 1], [1, 3]])
  np.testing.assert_allclose(p_value(difference_RK), [1, 2 / 6])


def test_holm_by_hand():
  np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
  np.testing.assert_allclose(holm([0.02]), [0.02])
  np.testing.assert_allclose(holm([0.6, 0.5]), [1, 1])
  assert holm([]).tolist() == []


def test_holm_keeps_all_true_nulls_in_nineteen_of_twenty_families():
  p_FP = np.random.default_rng(0).uniform(size=(4000, 6))
  wrong = np.mean([(holm(p_P) < 0.05).any() for p_P in p_FP])
  assert wrong == pytest.approx(0.05, abs=0.012)
  assert np.mean((p_FP < 0.05).any(axis=1)) > 0.2  # without correction


def test_over_seeds_by_hand():
  values_SUK = np.array([[[0.0], [1.0]], [[1.0], [1.0]], [[0.5], [1.0]]])
  values_UK, deviation_K = over_seeds(values_SUK)
  assert values_UK.tolist() == [[0.5], [1.0]]
  assert deviation_K == pytest.approx(np.std([0.5, 1.0, 0.75], ddof=1))
  values_UK, deviation_K = over_seeds(values_SUK[:1])
  assert values_UK.tolist() == [[0.0], [1.0]] and deviation_K is None


@pytest.mark.parametrize('values_MUK', [np.empty((1, 0, 2)), np.empty((0, 3, 2)), np.full((1, 2, 1), np.nan)])
def test_values_that_have_no_mean(values_MUK):
  with pytest.raises(ValueError, match='finite values of at least one'):
    bootstrap(values_MUK, resamples=10)


def test_large_values_are_summed_exactly_too():
  values_MUK = 1e9 * random_metrics(11, 1000, n_methods=3)
  found = bootstrap(values_MUK, resamples=64)
  again = bootstrap(values_MUK[::-1], resamples=64, block_bytes=1)
  np.testing.assert_array_equal(found.resampled_RMK, again.resampled_RMK[:, ::-1])
  np.testing.assert_allclose(found.resampled_RMK, 1e9 * bootstrap(values_MUK / 1e9, resamples=64).resampled_RMK, rtol=1e-9)
