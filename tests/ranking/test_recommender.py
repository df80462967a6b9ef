"""Recommendations: one outcome for any batching; what no history holds is found; filters act inside; bad input is named."""

import dataclasses
import gzip

import numpy as np
import pytest
from cold_shop import COLD, HISTORIES, OPTIONS

from calrec_jax.errors import UserError
from calrec_jax.ranking import recommender as module
from calrec_jax.ranking.rankers import RANKERS, RankerOptions, Rankers
from calrec_jax.ranking.recommender import Filters, Recommender

SETTINGS = {'n_samples': 2, 'users_per_batch': 2, 'temperature': 0.5}
RARE = Filters(category='rare')


@pytest.fixture(scope='module')
def recommender(loaded, index) -> Recommender:
  return Recommender(loaded, index, options=RankerOptions(**OPTIONS), **SETTINGS)


def ids(found) -> list[str]:
  return [each.item_id for each in found]


def same(mine, theirs):
  """The same items; where two have changed places, their scores are equal up to rounding."""
  assert len(mine) == len(theirs)
  for one, other in zip(mine, theirs, strict=True):
    np.testing.assert_allclose([each.score for each in one], [each.score for each in other], rtol=1e-5, atol=1e-5)
    scores = {each.item_id: each.score for each in other}
    for each in one[:-1]:  # of those tied with the last another may be listed
      assert each.score == pytest.approx(scores.get(each.item_id, other[-1].score), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize('ranker', RANKERS[:-1])
def test_one_by_one_is_as_in_a_batch_in_any_order(recommender, ranker):
  together = recommender.recommend(HISTORIES, 8, ranker=ranker)
  same(together, [recommender.recommend([history], 8, ranker=ranker)[0] for history in HISTORIES])
  same(together, recommender.recommend(HISTORIES[::-1], 8, ranker=ranker)[::-1])
  if ranker == 'bm25':  # its reasons hold the sampled texts and their probabilities
    alone = recommender.recommend([HISTORIES[2]], 8)[0]
    assert [each.reason for each in alone] == [each.reason for each in together[2]]
  with pytest.raises(AssertionError):
    same(together, together[::-1])


def test_noise_that_depends_on_the_place_in_a_batch_is_found_out(recommender, monkeypatch):
  monkeypatch.setattr(module, 'user_keys', lambda seed, ids: np.arange(2 * len(ids), dtype=np.uint32).reshape(-1, 2))
  twice = recommender.recommend([HISTORIES[0]] * 2, 8)
  with pytest.raises(AssertionError):
    same(twice[:1], twice[1:])


def test_the_users_id_decides_the_noise(recommender):
  def reasons(*user_ids, histories=HISTORIES[:1] * 3):
    found = recommender.recommend(histories[:len(user_ids)], 6, user_ids=user_ids)
    return [[each.reason for each in one] for one in found]
  ann, bob, again = reasons('ann', 'bob', 'ann')
  assert ann == again != bob and reasons('bob') == [bob]
  default = [each.reason for each in recommender.recommend(HISTORIES[:1], 6)[0]]
  assert default == reasons('\n'.join(HISTORIES[0]))[0] != ann
  with pytest.raises(ValueError, match='1 histories, but 2 user ids'):
    recommender.recommend(HISTORIES[:1], 6, user_ids=['ann', 'bob'])


@pytest.mark.parametrize('ranker', RANKERS)
def test_cold_items_of_an_own_category_are_found(recommender, ranker):
  rare = recommender.recommend(HISTORIES[:1], 10, ranker=ranker, filters=RARE)[0]
  assert sorted(ids(rare)) == ['rare-1', 'rare-2', 'rare-3']


@pytest.mark.parametrize('ranker', RANKERS[1:])
def test_a_cold_item_is_found_among_the_others(recommender, ranker):
  """Above every item of the other shop. BM25 finds it where its text is sampled: see `test_rankers.py`."""
  found = ids(recommender.recommend(HISTORIES[:1], 20, ranker=ranker)[0])
  assert 'cold' in found
  assert not any(item_id.startswith('books') for item_id in found[:found.index('cold')])


def test_as_many_are_listed_as_are_asked_for(loaded, index, monkeypatch):
  """More than a beam, a shortlist, or the candidates have places for."""
  options = []
  monkeypatch.setattr(module, 'Rankers', lambda *given: options.append(given[3]) or Rankers(*given))
  narrow = Recommender(loaded, index, options=RankerOptions(candidates=2, beam_width=2, shortlist_size=2), **SETTINGS)
  for ranker in ('bm25', 'dense', 'likelihood'):
    found = narrow.recommend(HISTORIES[:1], len(index.catalogue), ranker=ranker)[0]
    assert sorted(ids(found)) == sorted(index.catalogue.item_ids), ranker
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
  # A beam finds at least as many texts as it is wide, if there are so many.
  assert all(each.beam_width == len(index.catalogue) for each in options) and len(options) == 3


def test_filters_are_one(recommender, index):
  category_of = dict(zip(index.catalogue.item_ids, (item['category'] for item in index.items), strict=True))
  def recommend(**filters):
    return [ids(found) for found in recommender.recommend(HISTORIES, 16, ranker='dense', filters=Filters(**filters))]
  for name in ('RED', 'red'):
    assert all({category_of[item_id] for item_id in found} == {'red'} for found in recommend(category=name))
  for name in ('toys', 'Toys, Rare', 'toys > rare', 'rare'):
    assert set(recommend(category=name)[0]) == {'rare-1', 'rare-2', 'rare-3'}
  for history, found in zip(HISTORIES, recommend(exclude_seen=True), strict=True):
    assert len(found) == 16 and not set(found) & set(history)
  stock = ['cold', 'games-4', 'books-3', 'of another shop', '']
  assert [set(found) for found in recommend(in_stock=stock, exclude_seen=True)] == [
      {'cold', 'games-4', 'books-3'}, {'cold', 'games-4'}, {'books-3'}]
  assert set(recommend(in_stock=stock, category='red')[0]) == {'cold', 'books-3'} & {
      item_id for item_id, category in category_of.items() if category == 'red'}


def test_reasons_are_told(recommender, index):
  best = {ranker: recommender.recommend(HISTORIES[:1], 3, ranker=ranker)[0][0] for ranker in RANKERS}
  assert best['bm25'].reason.count('Title: games') and 0 < float(best['bm25'].reason.split()[0]) <= 1
  for ranker in ('constrained', 'likelihood'):
    assert best[ranker].reason == f'its text has probability {np.exp(best[ranker].score):.2g}'
  assert best['dense'].reason == f'cosine {best["dense"].score:.3f}' and best['fused'].reason == 'several rankings'
  found = recommender.recommend(HISTORIES[:1], 16, filters=RARE)[0]
  assert {each.title for each in found} == {'puzzle', 'books c1'}
  assert isinstance(found[0], type(best['bm25'])) and dataclasses.asdict(found[0]).keys() == {
      'item_id', 'title', 'score', 'reason'}


def test_items_without_a_title_are_called_by_their_text(recommender):
  items = [{**item, 'title': ''} for item in recommender.index.items]
  untitled = Recommender(recommender.loaded, dataclasses.replace(recommender.index, items=items))
  found = untitled.recommend(HISTORIES[:1], 1, ranker='dense', filters=Filters(in_stock=['cold']))[0]
  assert found[0].title == 'Title: games c0. Category: red. Brand: o. Price: $3.'


def test_unknown_items_are_passed_over_where_that_is_wished(recommender):
  known = recommender.recommend([HISTORIES[0]], 5, ranker='dense')
  found = recommender.recommend([['ghost', HISTORIES[0][0], 'spirit', HISTORIES[0][1]]], 5, ranker='dense', skip_unknown=True)
  assert found == known


# Bad input.


@pytest.mark.parametrize(('histories', 'options', 'told'), [
    ([['games-1'], ['games-1', 'ghost']], {}, "History 2: the catalogue has no item 'ghost'; correct it"),
    ([['ghost', 'games-1', 'spirit', 'x']], {}, "no item 'ghost' .and 2 more of them.*--skip_unknown"),
    ([['games-1'], []], {}, 'History 2: is empty; give at least one item'),
    ([['ghost']], {'skip_unknown': True}, 'History 1: is empty without its unknown items'),
    ([['games-1']], {'k': 37}, 'top = 37: the catalogue has 36 items'), ([['games-1']], {'k': 0}, 'top = 0'),
    ([], {'k': 37}, 'top = 37'),
    ([['games-1']], {'ranker': 'popular'}, 'name each once, out of bm25'),
    ([['games-1']], {'filters': Filters(category='rar')}, "category = 'rar': the catalogue has no such item"),
    ([], {'filters': Filters(category='no such')}, "category = 'no such'"),
    ([], {'filters': Filters(in_stock=['ghost'])}, 'filters leave no item of the catalogue'),
    ([['games-1']], {'filters': Filters(category='rare', in_stock=['cold'])}, 'filters leave no item of the catalogue'),
    ([['games-1'], ['cold']], {'filters': Filters(in_stock=['cold'], exclude_seen=True)}, 'History 2: the filters leave no')])
def test_bad_input_is_named(recommender, histories, options, told):
  with pytest.raises(UserError, match=told) as raised:
    recommender.recommend(histories, **{'k': 3} | options)
  assert '\n' not in str(raised.value)


def test_no_histories_have_no_recommendations(recommender):
  assert recommender.recommend([], 3) == []


def test_it_is_loaded_from_folders_that_fit(trained_run, index, recommender, tmp_path):
  index.save(tmp_path / 'index')
  stored = Recommender.load(trained_run, tmp_path / 'index', options=RankerOptions(**OPTIONS), **SETTINGS)
  assert stored.recommend(HISTORIES[:1], 5, ranker='dense') == recommender.recommend(HISTORIES[:1], 5, ranker='dense')
  dataclasses.replace(index, description={**index.description, 'weights': 'x'}).save(tmp_path / 'other')
  with pytest.raises(UserError, match='another weights'):
    Recommender.load(trained_run, tmp_path / 'other')
  with pytest.raises(UserError, match='not a whole index'):
    Recommender.load(trained_run, tmp_path)


def test_the_cold_items_are_in_no_history(tiny_store):
  bought = b''.join(gzip.decompress((tiny_store / 'data' / name / 'sequences.jsonl.gz').read_bytes())
                    for name in ('books', 'games')).decode()
  assert '"games-1"' in bought and not any(f'"{item_id}"' in bought for item_id in COLD)
