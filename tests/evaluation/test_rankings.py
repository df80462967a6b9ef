"""Rankings: places count strictly better and equal items; tied items are listed in an order that says nothing."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from calrec_jax.evaluation.rankings import place, read_rankings, tie_order, top_items, write_rankings

ITEM_IDS = [f'i{n}' for n in range(9)]


def test_places_by_hand():
  scores_I = np.array([0.5, 0.9, 0.5, 0.1, 0.5])
  assert [place(scores_I, item) for item in range(5)] == [(1, 2), (0, 0), (1, 2), (4, 0), (1, 2)]


def test_a_target_that_is_no_candidate_comes_after_all_items():
  scores_I, candidates_I = np.array([0.5, 0.9, 0.5, 0.1, 0.5]), np.array([True, False, True, True, False])
  assert [place(scores_I, item, candidates_I) for item in range(5)] == [(0, 1), (4, 0), (0, 1), (2, 0), (4, 0)]


scores = hnp.arrays(np.float64, 9, elements=st.integers(0, 4).map(float))


@hypothesis.given(scores_I=scores, n=st.integers(1, 12))
def test_the_top_is_a_full_sort_by_score_then_tie_order(scores_I, n):
  order_I = tie_order(ITEM_IDS)
  position_I = np.argsort(order_I)
  expected = sorted(range(9), key=lambda item: (-scores_I[item], position_I[item]))[:n]
  assert top_items(scores_I, order_I, n).tolist() == expected


def test_the_tie_order_is_of_the_ids_alone():
  order_I = tie_order(ITEM_IDS)
  assert sorted(order_I) == list(range(9)) and order_I.tolist() != list(range(9))
  backwards_I = tie_order(ITEM_IDS[::-1])
  assert [ITEM_IDS[::-1][item] for item in backwards_I] == [ITEM_IDS[item] for item in order_I]


def write(path, scorer, item_ids=ITEM_IDS):
  return write_rankings(path, scorer, users=[1, 0], user_ids=['"ä', 'b'], targets=[2, 0], item_ids=item_ids)


def test_lines_are_as_promised(tmp_path):
  path = tmp_path / 'rankings-x.jsonl.gz'
  better_U, tied_U, tops_UK = write(path, lambda user: np.arange(9.0) if user else np.ones(9))
  assert tops_UK[0].tolist() == [*range(8, -1, -1), *[-1] * 91]
  assert better_U.tolist() == [6, 0] and tied_U.tolist() == [0, 8]
  first, second = read_rankings(path)
  assert first == {'user_id': 'b', 'target': 'i2', 'better': 6, 'tied': 0,
                   'top': [{'item_id': f'i{n}', 'score': float(n)} for n in range(8, -1, -1)]}
  assert list(second) == ['user_id', 'target', 'better', 'tied', 'top'] and second['user_id'] == '"ä'
  assert [entry['item_id'] for entry in second['top']] == [ITEM_IDS[item] for item in tie_order(ITEM_IDS)]


def test_a_hundred_at_most_and_scores_to_the_last_bit(tmp_path):
  item_ids = [f'i{n}' for n in range(150)]
  scores_I = np.random.default_rng(0).random(150)
  write(tmp_path / 'r.gz', lambda user: scores_I, item_ids)
  top = next(read_rankings(tmp_path / 'r.gz'))['top']
  assert [entry['score'] for entry in top] == sorted(scores_I.tolist(), reverse=True)[:100]


def test_equal_rankings_are_equal_bytes(tmp_path):
  for name in ('a.gz', 'b.gz'):
    write(tmp_path / name, lambda user: np.arange(9.0))
  assert (tmp_path / 'a.gz').read_bytes() == (tmp_path / 'b.gz').read_bytes()


def test_only_candidates_are_counted_and_listed(tmp_path):
  allowed = {1: np.isin(np.arange(9), [0, 2, 7]), 0: None}
  found = write_rankings(tmp_path / 'r.gz', lambda user: np.arange(9.0), users=[1, 0], user_ids=['a', 'b'], targets=[2, 2],
                         item_ids=ITEM_IDS, candidates=allowed.get)
  assert found[0].tolist() == [1, 6] and found[2][0].tolist()[:4] == [7, 2, 0, -1]
  assert [entry['item_id'] for entry in next(read_rankings(tmp_path / 'r.gz'))['top']] == ['i7', 'i2', 'i0']


@pytest.mark.parametrize('scores_I', [np.full(9, np.nan), np.zeros(8), np.array([np.inf] + [0.0] * 8)])
def test_scores_that_are_none(tmp_path, scores_I):
  with pytest.raises(ValueError, match="9 finite scores for user 'b'"):
    write(tmp_path / 'r.gz', lambda user: scores_I)


def test_ids_that_need_escaping(tmp_path):
  write(tmp_path / 'r.gz', lambda user: np.array([2.0, 1.0, 0.0]), ['"', '\\n\n', 'ü'])
  assert [entry['item_id'] for entry in next(read_rankings(tmp_path / 'r.gz'))['top']] == ['"', '\\n\n', 'ü']
