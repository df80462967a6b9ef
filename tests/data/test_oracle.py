"""The generated store's rules, computed by hand on a small store."""

import json

import numpy as np
import pytest

from calrec_jax.data import oracle
from calrec_jax.errors import UserError

# Brand 0 has two kinds of two volumes, the first place twice (twins); brand 1 has one kind of two volumes.
PLACES = {'a1': (0, 0, 0), 'a1twin': (0, 0, 0), 'a2': (0, 0, 1), 'b1': (0, 1, 0), 'b2': (0, 1, 1), 'c1': (1, 0, 0),
          'c2': (1, 0, 1)}
POPULARITY = {'a1': 0.1, 'a1twin': 0.3, 'a2': 0.1, 'b1': 0.1, 'b2': 0.1, 'c1': 0.2, 'c2': 0.1}
WEIGHTS = {'succession': 0.4, 'companion': 0.2, 'return': 0.4, 'brand': 0.1, 'store': 0.1}


@pytest.fixture
def rules():
  brands, kinds, volumes = np.array(list(PLACES.values())).T
  return oracle.Oracle(tuple(PLACES), brands, kinds, volumes, np.array(list(POPULARITY.values())), WEIGHTS)


def by_hand(*parts):
  """The mixture of (weight, items) by popularity, over all items."""
  total = sum(weight for weight, _ in parts)
  expected = dict.fromkeys(PLACES, 0.0)
  for weight, items in parts:
    for item in items:
      expected[item] += weight / total * POPULARITY[item] / sum(POPULARITY[other] for other in items)
  return list(expected.values())


def others(last, brand=None):
  return [item for item, place in PLACES.items() if item != last and brand in (None, place[0])]


@pytest.mark.parametrize('context, parts', [
    ([], [(1, list(PLACES))]),
    (['a1'], [(.4, ['a2']), (.2, ['b1']), (.1, others('a1', 0)), (.1, others('a1'))]),
    # The last volume is followed by the next kind's first; the last kind by the first, and its twins share.
    (['a2'], [(.4, ['b1']), (.2, ['b2']), (.1, others('a2', 0)), (.1, others('a2'))]),
    (['b2'], [(.4, ['a1', 'a1twin']), (.2, ['a2']), (.1, others('b2', 0)), (.1, others('b2'))]),
    # b1 is the companion of a1 and of its twin: the next volume after a1 calls; older items do not matter.
    (['a1', 'b1'], [(.4, ['b2']), (.2, ['a1', 'a1twin']), (.4, ['a2']), (.1, others('b1', 0)), (.1, others('b1'))]),
    (['c1', 'a1twin', 'b1'], [(.4, ['b2']), (.2, ['a1', 'a1twin']), (.4, ['a2']), (.1, others('b1', 0)),
                              (.1, others('b1'))]),
    (['a1', 'b2'], [(.4, ['a1', 'a1twin']), (.2, ['a2']), (.1, others('b2', 0)), (.1, others('b2'))]),
    # A brand of one kind: the companion would be the item itself, so that rule has nothing to offer.
    (['c1'], [(.4, ['c2']), (.1, ['c2']), (.1, others('c1'))]),
])
def test_probabilities_by_hand(rules, context, parts):
  found = rules.probabilities(context, list(PLACES))
  np.testing.assert_allclose(found, by_hand(*parts), rtol=1e-12)
  assert found.dtype == np.float64 and abs(found.sum() - 1) < 1e-12


def test_last_item_is_never_next_and_the_order_asked_for_is_kept(rules):
  for item in PLACES:
    assert rules.probabilities([item], [item]) == 0
  whole = dict(zip(PLACES, rules.probabilities(['a1'], list(PLACES)), strict=True))
  np.testing.assert_array_equal(rules.probabilities(['a1'], ['c2', 'a2']), [whole['c2'], whole['a2']])


def test_twins_that_are_alone_in_all_they_share_still_go_on(rules):
  assert rules.probabilities(['c2', 'c1'], ['c2'])[0] > 0.6


def test_rules_come_back_from_the_store(rules, tmp_path):
  oracle.save_oracle(tmp_path, 'Things', rules)
  loaded = oracle.load_oracle(tmp_path, 'Things')
  for context in ([], ['a1'], ['a1', 'b1']):
    found, expected = (r.probabilities(context, list(PLACES)) for r in (loaded, rules))
    np.testing.assert_array_equal(found, expected)


def test_bad_input_is_named(rules, tmp_path):
  with pytest.raises(UserError, match="'x9' is not in this category"):
    rules.probabilities(['x9'], ['a1'])
  with pytest.raises(UserError, match='only a generated store has a ceiling'):
    oracle.load_oracle(tmp_path, 'Things')
  oracle.save_oracle(tmp_path, 'Things', rules)
  path = tmp_path / 'oracle/Things.json'
  for broken in ('{', '[]', json.dumps({'item_ids': ['a']})):
    path.write_text(broken)
    with pytest.raises(UserError, match=r'Things\.json: does not hold the rules'):
      oracle.load_oracle(tmp_path, 'Things')
