"""How sure a mean over users is, and a difference of two: the bootstrap over users, paired by construction.

A resample draws U users out of U, with replacement. All columns (methods times metrics) have their means over the same
resamples, so that what makes a user easy or hard for every method cancels in a difference. Sources: Efron & Tibshirani, An
Introduction to the Bootstrap (1993), chapters 13 (percentile intervals) and 16 (tests); Sakai, Evaluating Evaluation Metrics
based on the Bootstrap (SIGIR 2006), for rankings, who resamples topics where we resample users; Holm, A Simple Sequentially
Rejective Multiple Test Procedure (1979).
"""

import dataclasses
import math

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95  # of an interval
ALPHA = 0.05  # a difference holds if its corrected p is below
_BLOCK_BYTES = 1 << 25


@dataclasses.dataclass(frozen=True)
class Difference:
  """Of the means of K metrics, one method minus another, over the same users.

  Attributes:
    mean_K: float64 [K].
    low_K: float64 [K], the lower end of the 95 % percentile interval.
    high_K: float64 [K], the upper end.
    p_K: float64 [K], two-sided.
  """

  mean_K: np.ndarray
  low_K: np.ndarray
  high_K: np.ndarray
  p_K: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bootstrap:
  """Means over users, and over R resamples of them.

  Attributes:
    mean_MK: float64 [M, K], of M methods and K metrics.
    resampled_RMK: float64 [R, M, K], the same R resamples for all.
  """

  mean_MK: np.ndarray
  resampled_RMK: np.ndarray

  def interval(self, method: int) -> tuple[np.ndarray, np.ndarray]:
    """(low_K, high_K): the 95 % percentile interval of a method's means; see `percentile_interval`."""
    return percentile_interval(self.resampled_RMK[:, method])

  def difference(self, method: int, other: int) -> Difference:
    """`method` minus `other`: exactly 0, with p = 1, where both have the same values."""
    difference_RK = self.resampled_RMK[:, method] - self.resampled_RMK[:, other]
    return Difference(self.mean_MK[method] - self.mean_MK[other], *percentile_interval(difference_RK), p_value(difference_RK))


def bootstrap(
  values_MUK: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, block_bytes: int = _BLOCK_BYTES
) -> Bootstrap:
  """Resamples users: mean*(r) = sum over u of n_ru x_u / U, where n_r is how often resample r has drawn each user.

  The values are rounded to multiples of a power of two (by 2e-11 at most, for 100,000 users), so fine that each sum is exact in
  float64, in whatever order it is taken. So equal values have equal resampled means to the last bit, and neither the block, the
  threads, nor the other methods of the table move a number.

  Args:
    values_MUK: float [M, U, K], finite: K metrics of M methods for the same U users.
    resamples: R.
    seed: of the draws, which depend on it and on U alone.
    block_bytes: about the most memory for counts at a time; the time is about U * R * (15 ns + M K / 10 ns).

  Raises:
    ValueError: no users, or values that are not finite.
  """
  values_MUK = np.asarray(values_MUK, np.float64)
  n_methods, n_users, n_metrics = values_MUK.shape
  if not values_MUK.size or not np.isfinite(values_MUK).all():
    raise ValueError(f'Values of shape {values_MUK.shape}: expected finite values of at least one method, user and metric.')
  # All partial sums are below 2^53 units: U * bound < 2^exponent, and a unit is 2^(exponent - 52).
  bound = max(1.0, float(np.abs(values_MUK).max()))
  n_digits = 52 - math.frexp(n_users * bound)[1]
  units_UC = np.rint(np.ldexp(values_MUK.transpose(1, 0, 2), n_digits)).reshape(n_users, -1)
  rng = np.random.default_rng(seed)
  block = max(1, min(resamples, block_bytes // (8 * n_users)))
  counts_BU = np.empty((block, n_users))
  sums_RC = np.empty((resamples, n_methods * n_metrics))
  for start in range(0, resamples, block):
    stop = min(start + block, resamples)
    for row_U in counts_BU[:stop - start]:
      row_U[:] = np.bincount(rng.integers(n_users, size=n_users), minlength=n_users)
    np.matmul(counts_BU[:stop - start], units_UC, out=sums_RC[start:stop])
  means_RMK = (np.ldexp(sums_RC, -n_digits) / n_users).reshape(-1, n_methods, n_metrics)
  return Bootstrap(values_MUK.mean(axis=1), means_RMK)


def percentile_interval(means_RK: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
  """(low_K, high_K): the (1 - level) / 2 and (1 + level) / 2 quantiles over resamples (Efron & Tibshirani, section 13.3)."""
  low_K, high_K = np.quantile(means_RK, [(1 - level) / 2, (1 + level) / 2], axis=0)
  return low_K, high_K


def p_value(difference_RK: np.ndarray) -> np.ndarray:
  """Two-sided p of "the mean difference is 0": 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (R + 1), at most 1: float64 [K].

  It is the level at which the percentile interval begins to contain 0 (Efron & Tibshirani, section 15.4), so that interval and
  p agree; the 1 counts the sample itself, so that p is never 0 (Davison & Hinkley, Bootstrap Methods, 1997, section 4.2). Sakai
  shifts to a mean of 0 and studentises instead; for hundreds of users the two are near each other.
  """
  n_tail_K = np.minimum((difference_RK <= 0).sum(axis=0), (difference_RK >= 0).sum(axis=0))
  return np.minimum(1, 2 * (1 + n_tail_K) / (1 + len(difference_RK)))


def holm(p_P: np.ndarray) -> np.ndarray:
  """P values of p, corrected so that all the differences called at alpha hold jointly, but with probability alpha: float64 [P].

  In ascending order p(1) ... p(P): p'(i) = max over j <= i of min(1, (P - j + 1) p(j)). No independence is assumed (Holm 1979).
  """
  p_P = np.asarray(p_P, np.float64)
  order_P = np.argsort(p_P, kind='stable')
  corrected_P = np.empty_like(p_P)
  corrected_P[order_P] = np.minimum(1, np.maximum.accumulate(p_P[order_P] * np.arange(len(p_P), 0, -1)))
  return corrected_P


def over_seeds(values_SUK: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  """(values_UK, deviation_K) of one method trained with S seeds.

  values_UK is each user's mean over seeds, what is resampled: an interval is about other users, given these seeds. deviation_K
  is the sample standard deviation (S - 1) of the S means over users: about other seeds, given these users; None if S is 1.
  """
  deviation_K = values_SUK.mean(axis=1).std(axis=0, ddof=1) if len(values_SUK) > 1 else None
  return values_SUK.mean(axis=0), deviation_K
