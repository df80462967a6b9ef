"""A protocol's hash is its rules'."""

import json

import pytest

from calrec_jax.errors import UserError
from calrec_jax.evaluation.protocols import protocol, protocol_hash


def test_a_protocol_says_all_and_is_json():
  rules = protocol()
  assert json.loads(json.dumps(rules)) == rules
  assert rules['name'] == 'leave_one_out_full' and rules['split'] == 'test' and rules['users'] == 'all'
  assert {'candidates', 'seen_items', 'ties', 'duplicate_texts', 'metrics', 'min_history', 'context'} <= rules.keys()
  assert rules['hash'] == protocol_hash(rules) and len(rules['hash']) == 16


def test_other_rules_have_another_hash_and_the_same_rules_the_same():
  hashes = {protocol(**options)['hash'] for options in
            ({}, {'split': 'validation'}, {'max_users': 10}, {'max_users': 11}, {'split': 'test'})}
  assert len(hashes) == 4


def test_the_hash_does_not_depend_on_the_order_of_the_rules():
  rules = protocol()
  assert protocol_hash(dict(reversed(rules.items()))) == rules['hash']
  assert protocol_hash({**rules, 'seen_items': 'filtered'}) != rules['hash']


@pytest.mark.parametrize(('options', 'told'), [
  ({'name': 'leave_two_out'}, 'leave_two_out'), ({'split': 'train'}, 'validation'), ({'max_users': 0}, 'max_users'),
])
def test_unknown_rules(options, told):
  with pytest.raises(UserError, match=told):
    protocol(**options)
