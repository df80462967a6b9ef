"""Packing: every piece once, no row too full, and no more rows than the textbook's heuristic takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.text.packing import fill_rows


@st.composite
def problems(draw):
  """(sizes [n, c], capacity [c]): each piece fits a row."""
  capacity = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
  piece = st.tuples(st.integers(1, capacity[0]), *(st.integers(0, limit) for limit in capacity[1:]))
  sizes = draw(st.lists(piece, max_size=40))
  return np.asarray(sizes, np.int64).reshape(-1, len(capacity)), np.asarray(capacity)


def first_fit_decreasing(sizes: np.ndarray, capacity: int) -> int:
  """How many rows first-fit-decreasing takes, in one dimension."""
  rooms: list[int] = []
  for size in sorted(sizes.tolist(), reverse=True):
    fitting = next((i for i, room in enumerate(rooms) if room >= size), None)
    if fitting is None:
      rooms.append(capacity)
      fitting = -1
    rooms[fitting] -= size
  return len(rooms)


def check_packing(fill, sizes, capacity, rng=None):
  rows = fill(sizes, capacity, rng)
  assert sorted(piece for row in rows for piece in row.tolist()) == list(range(len(sizes)))
  assert all(len(row) for row in rows)
  assert all((sizes[row].sum(axis=0) <= capacity).all() for row in rows)


@given(problems(), st.none() | st.integers(0, 9))
@settings(deadline=None, max_examples=200)
def test_every_piece_once_and_no_row_too_full(problem, seed):
  check_packing(fill_rows, *problem, None if seed is None else np.random.default_rng(seed))


def _no_limits(sizes, capacity, rng):
  return fill_rows(sizes[:, :1], capacity[:1], rng)


def _drops_the_last(sizes, capacity, rng):
  return fill_rows(sizes, capacity, rng)[:-1]


@pytest.mark.parametrize('mutant', [_no_limits, _drops_the_last])
def test_mutants_of_packing_fail(mutant):
  sizes = np.stack([np.full(12, 3), np.full(12, 5)], axis=1)
  check_packing(fill_rows, sizes, np.array([12, 10]))
  with pytest.raises(AssertionError):
    check_packing(mutant, sizes, np.array([12, 10]))


def check_fullness(fill, sizes, capacity):
  assert len(fill(sizes[:, None], np.array([capacity]))) <= first_fit_decreasing(sizes, capacity) + 1


@given(st.integers(8, 64).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=60), st.just(c))))
@settings(deadline=None, max_examples=200)
def test_no_more_rows_than_first_fit_decreasing(problem):
  check_fullness(fill_rows, np.asarray(problem[0], np.int64), problem[1])


def test_a_mutant_of_fullness_fails():
  one_by_one = lambda sizes, capacity: [np.array([i]) for i in range(len(sizes))]
  with pytest.raises(AssertionError):
    check_fullness(one_by_one, np.full(8, 3), 12)


def test_a_row_is_as_full_as_its_pieces_allow():
  # 7 is the largest; what fills the other 5 is 3 + 2, not the greedy 4.
  rows = fill_rows(np.array([[7], [4], [3], [2]]), np.array([12]))
  assert [sorted(row.tolist()) for row in rows] == [[0, 2, 3], [1]]


def test_real_mixes_are_full():
  sizes = np.random.default_rng(0).integers(20, 300, (4000, 1))
  rows = fill_rows(sizes, np.array([512]), np.random.default_rng(0))
  assert sizes.sum() / (len(rows) * 512) > 0.99


def test_the_generator_chooses_among_pieces_of_one_size():
  sizes = np.full((40, 1), 4)
  packs = [np.concatenate(fill_rows(sizes, np.array([8]), np.random.default_rng(seed))).tolist() for seed in (0, 0, 1)]
  assert packs[0] == packs[1] != packs[2]
  assert np.concatenate(fill_rows(sizes, np.array([8]))).tolist() == list(range(40))


def test_a_piece_larger_than_a_row():
  with pytest.raises(ValueError, match='does not fit'):
    fill_rows(np.array([[3, 1], [2, 4]]), np.array([3, 3]))


def test_no_pieces():
  assert fill_rows(np.zeros((0, 2), np.int64), np.array([3, 3])) == []
