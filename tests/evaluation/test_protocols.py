"""A protocol says all that a number depends on, and its hash is its rules'; who is judged, and among which items."""

import dataclasses
import json

import numpy as np
import pytest

from calrec_jax.errors import UserError
from calrec_jax.evaluation.protocols import NEGATIVES, PROTOCOLS, Protocol, protocol_hash


def timed(shop):
  """The shop with an event a day for each user, split by time."""
  times = np.concatenate([np.arange(n) for n in np.diff(shop.offsets)]).astype(np.int64)
  return dataclasses.replace(shop, timestamps=times, cutoffs=(2, 4))


def test_a_protocol_says_all_and_is_json(shop):
  rules = Protocol().rules(shop)
  assert json.loads(json.dumps(rules)) == rules
  assert rules['name'] == 'leave_one_out_full' and rules['split'] == 'test' and rules['users'] == 'all'
  assert {'candidates', 'seen_items', 'ties', 'duplicate_texts', 'metrics', 'min_history', 'context', 'order_at_one_time',
          'repeats'} <= rules.keys()
  assert rules['hash'] == protocol_hash(rules) and len(rules['hash']) == 16
  assert 'caution' in Protocol('leave_one_out_sampled').rules(shop)


def test_other_rules_have_another_hash_and_the_same_rules_the_same(shop):
  options = [{}, {'split': 'validation'}, {'max_users': 10}, {'max_users': 11}, {'split': 'test'}, {'seen_items': 'filtered'},
             {'min_history': 4}, {'name': 'cold_items'}, {'name': 'leave_one_out_sampled'}]
  hashes = [Protocol(**each).rules(shop)['hash'] for each in options]
  prepared = [dataclasses.replace(shop, options=made) for made in ({'ties': 'dump'}, {'ties': 'hashed'}, {'repeats': 'kept'})]
  hashes += [Protocol().rules(data)['hash'] for data in prepared]
  hashes.append(Protocol('time_split_full').rules(timed(shop))['hash'])
  assert len(set(hashes)) == len(hashes) - 1


def test_the_hash_does_not_depend_on_the_order_of_the_rules(shop):
  rules = Protocol().rules(shop)
  assert protocol_hash(dict(reversed(rules.items()))) == rules['hash']
  assert protocol_hash({**rules, 'seen_items': 'filtered'}) != rules['hash']


@pytest.mark.parametrize(('options', 'told'), [
  ({'name': 'leave_two_out'}, 'leave_two_out'), ({'split': 'train'}, 'validation'), ({'max_users': 0}, 'max_users'),
  ({'min_history': 2}, 'min_history'), ({'seen_items': 'dropped'}, 'filtered'),
])
def test_unknown_rules(options, told):
  with pytest.raises(UserError, match=told):
    Protocol(**options)


def test_a_data_set_of_another_split_is_refused(shop):
  with pytest.raises(UserError, match='split by place in the history'):
    Protocol('time_split_full').rules(shop)
  for name in PROTOCOLS.keys() - {'time_split_full'}:
    with pytest.raises(UserError, match='split by time'):
      Protocol(name).rules(timed(shop))


def test_short_histories_are_left_out_and_counted(shop):
  assert Protocol().users(shop) == ([0, 1, 2], 0)
  assert Protocol(min_history=5).users(shop) == ([1, 2], 1)
  assert Protocol(min_history=5, max_users=1).users(shop) == ([1], 1)
  with pytest.raises(UserError, match='none of 3 users has 6 events'):
    Protocol(min_history=6).users(shop)


def test_cold_items_are_those_that_no_train_part_holds(shop):
  # Train parts hold g1 h1, g1 h1 h2 and g2 g1 h2; the targets are h2, h1 and t2.
  assert Protocol('cold_items').users(shop)[0] == [2]
  assert Protocol('cold_items', 'validation').users(shop)[0] == [1, 2]  # g1, t1, t1
  warm = dataclasses.replace(shop, events=np.zeros_like(shop.events))
  with pytest.raises(UserError, match='that a train part holds'):
    Protocol('cold_items').users(warm)


def test_a_split_by_time_judges_who_bought_in_the_period(shop):
  data = timed(shop)
  assert Protocol('time_split_full', 'validation').users(data)[0] == [0, 1, 2]
  assert Protocol('time_split_full').users(data)[0] == [1, 2]  # ann's four events end before day 4
  assert data.seen(1, 'test').tolist() == data.history(1).tolist()


def test_candidates(shop):
  assert Protocol().candidates(shop, 0) is None
  filtered = Protocol(seen_items='filtered')
  assert [np.flatnonzero(filtered.candidates(shop, user)).tolist() for user in (0, 1)] == [[1, 3, 4, 5], [1, 5]]


def test_sampled_negatives_are_of_the_user_alone_and_never_bought(shop):
  items = [f'i{n}' for n in range(500)]
  data = dataclasses.replace(shop, item_ids=items, items=[shop.items[0]] * 500)
  sampled = Protocol('leave_one_out_sampled')
  drawn = [sampled.candidates(data, user) for user in range(3)]
  for user, allowed_I in enumerate(drawn):
    seen = data.seen(user, 'test')
    assert allowed_I.sum() == NEGATIVES + 1 and allowed_I[seen[-1]] and not allowed_I[np.setdiff1d(seen[:-1], seen[-1:])].any()
    assert (sampled.candidates(data, user) == allowed_I).all()
  assert (drawn[1] != drawn[2]).any()
