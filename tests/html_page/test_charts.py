"""Charts: ticks enclose what is drawn, thinning keeps the ends."""

import pytest

from calrec_jax.html_page import charts


@pytest.mark.parametrize(('low', 'high'), [(0, 1), (0, 0), (5, 5), (-3, 1e6), (1e-9, 2e-9), (0.0331, 0.0337)])
def test_ticks_enclose_what_is_drawn(low, high):
  found = charts.ticks(low, high, 5)
  assert found == sorted(set(found)) and 2 <= len(found) <= 8
  slack = 1e-6 * (found[1] - found[0])
  assert found[0] <= low + slack and found[-1] >= high - slack


def test_thinning_keeps_the_ends():
  points = [(step, 1.0) for step in range(1000)]
  found = charts.thinned(points)
  assert found[0] == points[0] and found[-1] == points[-1] and len(found) <= 301
