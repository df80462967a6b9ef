"""BM25 of the last items' texts: the sum of what each scores alone, and nothing else of the data."""

import numpy as np
import pytest
from test_baselines import check_blind

from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import bm25_last
from calrec_jax.ranking.bm25 import Bm25, Bm25Options
from calrec_jax.text.templates import ItemTemplate

TITLE = ItemTemplate(fields=('title',))


@pytest.mark.parametrize(('split', 'contexts'), [
  ('test', [['g1', 'h1', 'g1'], ['g1', 'h1', 'h2', 't1'], ['g2', 'g1', 'h2', 't1']]),
  ('validation', [['g1', 'h1'], ['g1', 'h1', 'h2'], ['g2', 'g1', 'h2']]),
])
@pytest.mark.parametrize('last_n', [1, 2, 9])
def test_scores_are_sums_over_the_last_items(shop, split, contexts, last_n):
  alone_II = Bm25(['Title: ' + item['title'] + '.' for item in shop.items]).scores(
    ['Title: ' + item['title'] + '.' for item in shop.items])
  scorer = bm25_last.scorer(shop, split, TITLE, last_n=last_n)
  for user, context in enumerate(contexts):
    last = [shop.item_ids.index(item_id) for item_id in context[-last_n:]]
    scores_I = scorer(user)
    assert scores_I.dtype == np.float64
    np.testing.assert_allclose(scores_I, alone_II[last].sum(0), rtol=1e-12)


def test_like_texts_are_near_and_equal_texts_tie(shop):
  scores = dict(zip(shop.item_ids, bm25_last.scorer(shop, 'test', TITLE)(1), strict=True))  # after t1, 'Duct Tape'
  assert scores['t1'] == scores['t2'] > scores['g1'] == scores['h1'] == scores['h2']
  scores = dict(zip(shop.item_ids, bm25_last.scorer(shop, 'test', TITLE)(0), strict=True))  # after g1, 'Strong Glue'
  assert scores['g1'] > scores['g2'] > scores['h1']


def test_the_fields_of_bm25_are_those_of_query_and_index(shop):
  wide = bm25_last.scorer(shop, 'test', bm25=Bm25Options(fields=('title',)))
  for user in range(3):
    np.testing.assert_array_equal(wide(user), bm25_last.scorer(shop, 'test', TITLE)(user))


@pytest.mark.parametrize('split', ['test', 'validation'])
def test_the_targets_change_nothing(shop, split, monkeypatch):
  check_blind(bm25_last, shop, split)
  seen = type(shop).seen
  monkeypatch.setattr(type(shop), 'seen', lambda self, user, split: np.append(seen(self, user, split), 0))
  with pytest.raises(AssertionError):  # the mutant whose query is the target is seen
    check_blind(bm25_last, shop, split)


def test_an_option_out_of_range_is_told(shop):
  with pytest.raises(UserError, match=r'^BM25 of the last items: last_n = 0; give at least 1\.$'):
    bm25_last.scorer(shop, 'test', last_n=0)
