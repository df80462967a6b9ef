"""The baselines count by hand, on train parts only, and see no more of a history than the split allows."""

import dataclasses

import numpy as np
import pytest

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.baselines import last_item, popularity, transitions

BASELINES = {'popularity': popularity, 'last_item': last_item, 'transitions': transitions}


def test_popularity_by_hand(shop):
  scores_I = popularity.scorer(shop, 'test')(0)
  assert dict(zip(shop.item_ids, scores_I, strict=True)) == {'g1': 3, 'g2': 1, 'h1': 2, 'h2': 2, 't1': 0, 't2': 0}


@pytest.mark.parametrize(('split', 'last'), [('test', ['g1', 't1', 't1']), ('validation', ['h1', 'h2', 'h2'])])
def test_last_item_by_hand(shop, split, last):
  scores_I = last_item.scorer(shop, split)
  for user, item_id in enumerate(last):
    expected_I = np.zeros(6)
    expected_I[shop.item_ids.index(item_id)] = 1
    np.testing.assert_array_equal(scores_I(user), expected_I)


def test_transitions_by_hand(shop):
  # Train parts: g1 h1 | g1 h1 h2 | g2 g1 h2. After g1: h1 twice, h2 once; after h1: h2 once.
  tie_breaker = np.array([3, 1, 2, 2, 0, 0]) / 4
  test, validation = transitions.scorer(shop, 'test'), transitions.scorer(shop, 'validation')
  np.testing.assert_array_equal(test(0), tie_breaker + [0, 0, 2, 1, 0, 0])  # last visible: g1
  np.testing.assert_array_equal(test(1), tie_breaker)  # t1, in no train part
  np.testing.assert_array_equal(validation(0), tie_breaker + [0, 0, 0, 1, 0, 0])  # h1
  np.testing.assert_array_equal(validation(2), tie_breaker)  # h2 ends a train part: what follows is held out
  np.testing.assert_array_equal(test(0), test(0))  # no user's scores leak into the next one's


def with_other_targets(histories, split):
  """The same data, but for what `split` must not see: each target, and, for validation, the event after it."""
  events = histories.events.copy()
  hidden = {'test': 1, 'validation': 2}[split]
  for end in histories.offsets[1:]:
    events[end - hidden:end] = (events[end - hidden:end] + 1) % len(histories.item_ids)
  return dataclasses.replace(histories, events=events)


def check_blind(module, histories, split):
  blind, seeing = module.scorer(with_other_targets(histories, split), split), module.scorer(histories, split)
  for user in range(len(histories.user_ids)):
    np.testing.assert_array_equal(blind(user), seeing(user))


@pytest.mark.parametrize('split', ['test', 'validation'])
@pytest.mark.parametrize('name', BASELINES)
def test_a_baseline_is_blind_to_the_targets(shop, name, split):
  check_blind(BASELINES[name], shop, split)


@pytest.mark.parametrize('name', ['popularity', 'transitions'])
def test_counting_all_events_is_seen(shop, name, monkeypatch):
  monkeypatch.setattr(popularity, 'in_train', lambda histories: np.ones(len(histories.events), bool))
  with pytest.raises(AssertionError):
    check_blind(BASELINES[name], shop, 'test')


@pytest.mark.parametrize('name', ['last_item', 'transitions'])
def test_looking_at_the_target_is_seen(shop, name, monkeypatch):
  seen = Histories.seen
  monkeypatch.setattr(Histories, 'seen', lambda data, user, split: np.append(seen(data, user, split), 0))  # [-2]: the target
  with pytest.raises(AssertionError):
    check_blind(BASELINES[name], shop, 'test')


def test_popularity_never_outweighs_a_transition(shop):
  assert transitions.scorer(shop, 'test')(1).max() < 1
