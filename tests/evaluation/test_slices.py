"""Slices divide the users; what a list is like is counted by hand."""

import dataclasses
import math

import numpy as np
import pytest

from calrec_jax.evaluation.beyond_accuracy import beyond_accuracy
from calrec_jax.evaluation.slices import broad_categories, groups, sliced


def test_groups_by_hand(shop):
  # Train parts hold g1 three times, h1 and h2 twice, g2 once; the targets are h2, h1 (bought before) and t2.
  priced = dataclasses.replace(shop, items=[*shop.items[:-1], shop.items[-1] | {'price': '$5'}])
  found = groups(priced, 'test', [0, 1, 2])
  assert found == {
    'history': ['3-4', '3-4', '3-4'], 'target popularity': ['1-4', '1-4', '0'], 'target': ['warm', 'warm', 'cold'],
    'repeat': ['new', 'repeat', 'new'], 'category': ['unknown'] * 3, 'price': ['unknown', 'unknown', 'known']}
  assert groups(shop, 'validation', [1])['history'] == ['3-4']


def test_the_broadest_level_that_divides():
  assert broad_categories(['Office, Paper, Labels', 'Office, Ink', '', 'Office']) == ['Paper', 'Ink', 'unknown', 'Office']
  assert broad_categories(['Games', 'Toys, Balls']) == ['Games', 'Toys']
  assert broad_categories(['', '']) == ['unknown', 'unknown'] and broad_categories(['A, B', 'A, B']) == ['A', 'A']


def test_groups_of_a_slice_have_their_own_means_in_their_natural_order():
  values = {'x': {'recall@10': np.array([1.0, 0, 1, 0]), 'ndcg@10': np.array([0.5, 0, 1, 0])}}
  found = sliced({'history': ['10-19', '1-2', '10-19', '20+'], 'kind': ['other', 'b', 'a', 'unknown']}, values)
  assert list(found['history']) == ['1-2', '10-19', '20+'] and list(found['kind']) == ['a', 'b', 'other', 'unknown']
  assert found['history']['10-19'] == {'users': 2, 'methods': {'x': {'recall@10': 1.0, 'ndcg@10': 0.75}}}


def test_lists_by_hand():
  tops_UK = np.array([[0, 1, -1], [0, 2, 1]])
  found = beyond_accuracy(tops_UK, contexts=[np.array([1]), np.array([3])], targets_U=np.array([0, 1]), counts_I=np.array(
    [6, 2, 0, 1]))
  assert found['coverage@10'] == 3 / 4
  assert found['popularity@10'] == pytest.approx((6 + 2 + 6 + 0 + 2) / 5 / 4)
  assert found['repeats@10'] == 1 / 5
  bits = [-math.log2((count + 1) / 13) for count in (6, 2, 6, 0, 2)]
  assert found['novelty@10'] == pytest.approx(sum(bits) / 5)


def test_targets_that_were_never_bought_before_have_no_popularity_to_compare_with():
  assert beyond_accuracy(np.array([[0]]), contexts=[np.array([0])], targets_U=np.array([1]), counts_I=np.array([3, 0]))[
    'popularity@10'] is None
