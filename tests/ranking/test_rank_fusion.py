"""Fusion by reciprocal ranks: hand-counted; what is learned prefers a useful ranking to a random one, and says what it adds."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.errors import UserError
from calrec_jax.evaluation.fusion_weights import learn
from calrec_jax.ranking.order import Ranked
from calrec_jax.ranking.rank_fusion import fuse, read_weights, write_weights


def ranked(*pairs) -> Ranked:
  items, scores = zip(*pairs, strict=True) if pairs else ((), ())
  return Ranked(np.asarray(items, np.int64), np.asarray(scores, np.float64))


A, B = ranked((7, 9.0), (2, 5.0), (4, 5.0), (1, -1.0)), ranked((4, 0.5), (9, 0.25))


def test_scores_counted_by_hand():
  found = fuse({'a': A, 'b': B})
  assert found.items.tolist() == [4, 7, 2, 9, 1]
  np.testing.assert_allclose(found.scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 62, 1 / 64])  # tied: the best rank of theirs
  found = fuse({'a': A, 'b': B}, {'b': 3.0})
  assert found.items.tolist() == [4, 9, 1, 2, 7]
  np.testing.assert_allclose(found.scores, [3 / 61, 3 / 62, 0, 0, 0])


def test_nothing_listed_is_nothing_fused():
  found = fuse({'a': ranked(), 'b': ranked()})
  assert not len(found.items) and not len(found.scores)
  assert fuse({'a': ranked(), 'b': B}).items.tolist() == [4, 9]


LISTS = st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(-3, 3)), max_size=8, unique_by=lambda pair: pair[0]),
                 min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(LISTS, st.lists(st.floats(0, 4), min_size=4, max_size=4))
def test_any_lists_are_fused_as_by_a_plain_loop(lists, weights):
  given_lists = {f'r{n}': ranked(*sorted(pairs, key=lambda pair: -pair[1])) for n, pairs in enumerate(lists)}
  by_name = {f'r{n}': weight for n, weight in enumerate(weights)}
  wanted = {}
  for n, pairs in enumerate(lists):
    for item, score in pairs:
      rank = 1 + sum(other > score for _, other in pairs)
      wanted[item] = wanted.get(item, 0) + weights[n] / (60 + rank)
  found = fuse(given_lists, by_name)
  assert sorted(found.items.tolist()) == sorted(wanted)
  np.testing.assert_allclose(found.scores, [wanted[item] for item in found.items.tolist()], rtol=1e-12)
  assert (np.diff(found.scores) <= 0).all()


def users(n, *, items=200, hit=0.7, seed=0):
  """(lists, targets): `useful` has the target first for most users, `random` has it anywhere."""
  rng = np.random.default_rng(seed)
  lists, targets = [], []
  for _ in range(n):
    useful, random = rng.permutation(items), rng.permutation(items)
    target = int(useful[0]) if rng.random() < hit else int(rng.integers(items))
    falling = -np.arange(12.0)
    lists.append({'useful': Ranked(useful[:12], falling), 'random': Ranked(random[:12], falling)})
    targets.append(target)
  return lists, targets


def test_a_useful_ranking_is_what_adds_and_a_random_one_is_left_out():
  learned = learn(*users(200))
  weights, gain, ndcg = learned['weights'], learned['gain'], learned['ndcg@10']
  # Places weigh 1 / 61, 1 / 62, …: even a small weight of the random one would reorder neighbours.
  assert weights['useful'] > weights['random'] == 0 and gain['useful'] > 0.3 and -0.1 < gain['random'] < 0
  assert ndcg['useful'] > 0.6 > 0.3 > ndcg['random'] and ndcg['fused'] == pytest.approx(ndcg['useful'])
  assert gain.keys() == weights.keys() == {'useful', 'random'} and 150 < learned['users'] <= 200


def test_two_halves_of_the_truth_are_both_worth_something():
  """Each ranking knows the target of every second user or so: together they are better than alone."""
  rng = np.random.default_rng(1)
  def listing(first):
    items = dict.fromkeys([*first, *rng.integers(1000, 2000, 9).tolist()])
    return ranked(*((item, -place) for place, item in enumerate(items)))
  lists, targets = [], rng.integers(1000, size=200).tolist()
  for target in targets:
    known = [[target], []] if rng.random() < 0.5 else [[], [target]]
    lists.append({'a': listing(known[0]), 'b': listing(known[1])})
  learned = learn(lists, targets)
  assert min(learned['gain'].values()) > 0.1 and min(learned['weights'].values()) > 0
  assert learned['ndcg@10']['fused'] > max(learned['ndcg@10']['a'], learned['ndcg@10']['b']) + 0.1


def test_ties_are_worth_the_mean_over_their_orders():
  tied = ranked((1, 1.0), (2, 1.0), (3, 0.0))
  learned = learn([{'tied': tied}] * 4, [1, 2, 1, 2])
  assert learned['ndcg@10']['tied'] == pytest.approx((1 + 1 / np.log2(3)) / 2)
  assert learned['ndcg@10']['fused'] == learned['ndcg@10']['tied'] and learned['gain'] == {}


@pytest.mark.parametrize('n', [1, 2, 3])
def test_few_users_are_enough_to_learn(n):
  learned = learn([{'a': A, 'b': B, 'c': ranked()}] * n, [9] * n)
  assert learned['users'] == n and learned['weights']['b'] > learned['weights']['a']
  assert learned['gain'].keys() == {'a', 'b', 'c'} and all(map(np.isfinite, learned['gain'].values()))


def test_users_whose_target_no_ranking_lists_teach_nothing():
  lists, targets = users(60)
  learned = learn([*lists, *lists[:10]], [*targets, *[10_000] * 10])
  assert learned['weights'] == pytest.approx(learn(lists, targets)['weights'])


@pytest.mark.parametrize(('lists', 'targets'), [([], []), ([{'a': A, 'b': B}] * 3, [99, 98, 97]), ([{'a': ranked()}], [1])])
def test_where_no_target_is_listed_there_is_nothing_to_learn(lists, targets):
  with pytest.raises(UserError, match='no ranking lists the next item'):
    learn(lists, targets)


def test_weights_go_through_a_file_or_its_folder(tmp_path):
  learned = learn(*users(40))
  write_weights(tmp_path, learned)
  assert read_weights(tmp_path) == read_weights(tmp_path / 'fusion.json') == learned['weights']
  assert json.loads((tmp_path / 'fusion.json').read_text()) == learned


@pytest.mark.parametrize('text', [None, '', '[]', '{"weights": [1]}', '{"weights": {"a": "much"}}', '{"weights": {"a": NaN}}',
                                  '{"weights": {"a": -1}}', '{"users": 3}'])
def test_a_file_that_has_no_weights_is_named(tmp_path, text):
  if text is not None:
    (tmp_path / 'fusion.json').write_text(text)
  with pytest.raises(UserError, match='fusion.json: no weights of a fusion'):
    read_weights(tmp_path)
