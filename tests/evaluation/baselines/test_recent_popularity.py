"""Recent events count, in train parts only: by the clock where there is one, else by place in the history."""

import dataclasses

import numpy as np
import pytest

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import popularity, recent_popularity

ITEMS = ['a', 'b', 'c', 'd']
# Train parts, with times: a0 a4 b9 | c1 a10 | b2. After each bar, what is held out.
EVENTS = [0, 0, 1, 3, 3, 2, 0, 3, 2, 1, 3, 3]
TIMES = [0, 4, 9, 50, 60, 1, 10, 10, 99, 2, 3, 4]


def timed(events=EVENTS, times=TIMES) -> Histories:
  empty = dict.fromkeys(('title', 'category', 'brand', 'price'), '')
  return Histories('timed', ['u', 'v', 'w'], ITEMS, [empty] * 4, np.array([0, 5, 9, 12]), np.array(events, np.int32),
                   None if times is None else np.array(times, np.int64))


@pytest.mark.parametrize(('share', 'recent'), [
  (0.1, [1, 1, 0, 0]), (0.6, [2, 1, 0, 0]), (0.59, [1, 1, 0, 0]), (1, [3, 2, 1, 0]),
])
def test_the_clock_decides_by_hand(share, recent):
  # The train parts' time goes from 0 to 10: held-out events at 50 and 99 do not stretch it. Both ends are in.
  scores_I = recent_popularity.scorer(timed(), 'test', share=share)(0)
  np.testing.assert_array_equal(scores_I, np.array(recent) + np.array([3, 2, 1, 0]) / 4)


@pytest.mark.parametrize(('share', 'recent'), [
  (0.1, [1, 2, 0, 0]), (0.5, [2, 2, 0, 0]), (0.7, [3, 2, 1, 0]), (1, [3, 2, 1, 0]),
])
def test_without_times_the_ends_of_train_parts_count_by_hand(share, recent):
  # The train parts: a a b | c a | b. A tenth is one event of each; the half is 2, 1, 1; seven tenths are 3, 2, 1.
  scores_I = recent_popularity.scorer(timed(times=None), 'test', share=share)(0)
  np.testing.assert_array_equal(scores_I, np.array(recent) + np.array([3, 2, 1, 0]) / 4)


def test_a_share_of_a_whole_number_of_events_is_not_rounded_up():
  histories = Histories('long', ['u'], ['a'], [{}], np.array([0, 102]), np.zeros(102, np.int32))
  assert 0.07 * 100 > 7 and recent_popularity.is_recent(histories, 0.07).sum() == 7


@pytest.mark.parametrize('times', [None, TIMES])
def test_all_of_the_span_is_popularity(times):
  histories = timed(times=times)
  np.testing.assert_array_equal(recent_popularity.is_recent(histories, 1.0), popularity.in_train(histories))


def check_blind(times):
  other, later = np.array(EVENTS), None if times is None else np.array(times)
  for end in (5, 9, 12):
    other[end - 2:end] = (other[end - 2:end] + 1) % 4
    if later is not None:
      later[end - 2:end] += 1000
  for split in ('validation', 'test'):
    scores_I = recent_popularity.scorer(timed(times=times), split, share=0.3)(0)
    np.testing.assert_array_equal(scores_I, recent_popularity.scorer(timed(other, later), split, share=0.3)(0))


@pytest.mark.parametrize('times', [None, TIMES])
def test_held_out_events_change_nothing(times, monkeypatch):
  check_blind(times)
  monkeypatch.setattr(popularity, 'in_train', lambda histories: np.ones(len(histories.events), bool))
  with pytest.raises(AssertionError):  # the mutant that counts all events is seen
    check_blind(times)


def test_train_parts_without_events_score_zero():
  histories = dataclasses.replace(timed(EVENTS[:2], TIMES[:2]), user_ids=['u'], offsets=np.array([0, 2]))
  np.testing.assert_array_equal(recent_popularity.scorer(histories, 'test')(0), np.zeros(4))


@pytest.mark.parametrize('share', [0, -0.1, 1.01, float('nan')])
def test_a_share_out_of_range_is_told(share):
  with pytest.raises(UserError, match=r'^recent popularity: share = \S+; give a number above 0, up to 1\.$'):
    recent_popularity.scorer(timed(), 'test', share=share)
