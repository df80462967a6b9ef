"""Distributions of counts: quantiles, bins and inequality are those of a plain loop."""

import fractions

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calrec_jax.description import distributions

counts = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 10**9)), min_size=1, max_size=50)


@given(counts)
def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed(values):
  found = distributions.quantiles(np.array(values))
  for percent in distributions.PERCENTS:
    assert found[f'p{percent}'] == min(value for value in values
                                       if 100 * sum(other <= value for other in values) >= percent * len(values))
  assert (found['min'], found['max']) == (min(values), max(values))
  assert found['mean'] == pytest.approx(sum(values) / len(values))


@given(counts)
@example([7])
@example(list(range(1, 10**6, 997)))
@example([10**15, 10**15 + 1])
def test_bins_follow_each_other_and_hold_every_value_once(values):
  bins = distributions.histogram(np.array(values))
  assert bins[0]['from'] == min(values) and bins[-1]['to'] == max(values) and len(bins) <= 40
  assert all(after['from'] == before['to'] + 1 for before, after in zip(bins, bins[1:], strict=False))
  for each in bins:
    assert each['from'] <= each['to']
    assert each['count'] == sum(each['from'] <= value <= each['to'] for value in values)


def test_the_bins_of_the_docstring():
  bins = distributions.histogram(np.arange(1, 1000))
  assert [(each['from'], each['to']) for each in bins[:7]] == [(1, 1), (2, 2), (3, 4), (5, 6), (7, 9), (10, 14), (15, 19)]
  assert [each['from'] for each in distributions.histogram(np.array([80, 119]))] == [80, 85, 90, 95, 100, 105, 110, 115]
  assert distributions.histogram(np.zeros(0, int)) == [] and distributions.quantiles(np.zeros(0, int)) == {}


@given(counts)
def test_gini_is_the_mean_difference_of_two_over_twice_the_mean(values):
  n, total = len(values), sum(values)
  differences = sum(abs(one - other) for one in values for other in values)
  expected = fractions.Fraction(differences, 2 * n * total) if total else 0
  assert distributions.gini(np.array(values)) == pytest.approx(float(expected), abs=1e-12)


@given(counts, st.integers(1, 100))
def test_the_top_has_the_greatest(values, percent):
  found = distributions.top_share(np.array(values), percent)
  n = next(n for n in range(len(values) + 1) if 100 * n >= percent * len(values))
  top = sum(sorted(values, reverse=True)[:n])
  assert (found['n'], found['sum']) == (n, top)
  assert found['share'] == (top / sum(values) if sum(values) else 0)
