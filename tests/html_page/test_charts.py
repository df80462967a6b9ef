"""Charts: ticks enclose what is drawn, thinning keeps the ends, bars are as long as their counts."""

import pytest
from html_page_parser import Page

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


def test_bars_have_lengths_like_their_counts_and_lie_inside():
  counts = [('0', 0), ('1–2', 1), ('<b>', 500), ('10,000–14,999', 1000)]
  found = Page(charts.bars('a & b', counts))
  [(svg, said)] = found.of('svg')
  assert svg['aria-label'] == 'a & b. 0: 0; 1–2: 1; <b>: 500; 10,000–14,999: 1,000' and not found.wrong and not found.open
  bars = [each for each, _ in found.of('rect')]
  lengths = [float(each['width']) for each in bars]
  assert lengths[:2] == [0, 1] and lengths[2] == pytest.approx(lengths[3] / 2, abs=0.1)
  assert all(float(each['x']) + float(each['width']) < int(svg['width']) == 320 for each in bars)
  assert all(float(each['y']) + 12 <= int(svg['height']) for each in bars)
  assert [text for _, text in found.of('text')][1::2] == [name for name, _ in counts]


def test_bars_with_long_names_have_room():
  found = Page(charts.bars('t', [('9,000,000,000–9,999,999,999', 10**12)]))
  [(svg, _)], [(bar, _)] = found.of('svg'), found.of('rect')
  assert float(bar['width']) >= 60 and int(svg['width']) > 320
