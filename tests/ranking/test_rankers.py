"""Each ranker is its definition by brute force; items of one text are tied; filters act inside the search."""

import dataclasses

import numpy as np
import pytest
from cold_shop import OPTIONS, TEXTS

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.evaluate import calrec_scorer
from calrec_jax.evaluation.generations import Generation
from calrec_jax.ranking import rank_fusion
from calrec_jax.ranking.bm25 import LUCENE
from calrec_jax.ranking.dense import unit
from calrec_jax.ranking.fusion import EPSILON, quasi_round_robin
from calrec_jax.ranking.index import build_index
from calrec_jax.ranking.order import tie_order
from calrec_jax.ranking.rankers import RANKERS, RankerOptions, Rankers, check_names, needed_by

USERS = range(len(TEXTS))


def agrees(ranked, scores_I, index, *, candidates=OPTIONS['candidates'], atol=1e-4):
  """That a ranking lists the best of these scores, downwards, with all that share the last one's text."""
  np.testing.assert_allclose(ranked.scores, scores_I[ranked.items], rtol=1e-5, atol=atol)
  assert (np.diff(ranked.scores) <= 0).all() and len(set(ranked.items.tolist())) == len(ranked.items)
  unlisted = np.setdiff1d(np.flatnonzero(scores_I > -np.inf), ranked.items)
  assert (scores_I[unlisted] <= ranked.scores[-1] + atol).all()
  assert candidates <= len(ranked.items) + len(unlisted) and len(ranked.items) <= candidates + 1  # two items share a text
  assert not set(index.trie.texts_I[unlisted]) & set(index.trie.texts_I[ranked.items])


@pytest.fixture(scope='module')
def rankings(rank, index):
  return rank(index)


@pytest.fixture(scope='module')
def likelihoods(rank, index):
  """float64 [I] of each user: the log-probability of every item's text."""
  found = []
  for user in rank(index, ('likelihood',), shortlist='all', candidates=40):
    ranked = user['likelihood']
    assert len(ranked.items) == len(index.catalogue)
    found.append(np.zeros(len(ranked.items)))
    found[-1][ranked.items] = ranked.scores
  return found


def test_bm25_is_the_evaluations_ranker(rankings, index, loaded):
  ids = [f'u{user}' for user in USERS]
  data = Histories('shop', ids, index.catalogue.item_ids, list(index.items), np.arange(len(TEXTS) + 1),
                   np.zeros(len(TEXTS), np.int32))
  of = {user_id: Generation(*texts) for user_id, texts in zip(ids, TEXTS, strict=True)}
  scorer = calrec_scorer(data, loaded.template, of, bm25=LUCENE, epsilon=EPSILON)
  order_I = tie_order(index.catalogue.item_ids)
  for user in USERS:
    scores_I, ranked = scorer(user), rankings[user]['bm25']
    wanted = sorted(order_I.tolist(), key=lambda item, scores_I=scores_I: -scores_I[item])[:len(ranked.items)]
    assert ranked.items.tolist() == wanted
    np.testing.assert_array_equal(ranked.scores, scores_I[wanted])
    agrees(ranked, scores_I, index, candidates=35, atol=0)  # the catalogue's texts: it shortlists for `likelihood` too
  assert rankings[0]['bm25'].items[0] == index.item_numbers['cold']


def test_dense_is_the_cosine(rankings, index, prefix):
  cosines_UT = unit(prefix.user_UD).astype(np.float64) @ unit(index.texts_TD).astype(np.float64).T
  for user in USERS:
    scores_I = cosines_UT[user, index.trie.texts_I]
    agrees(rankings[user]['dense'], scores_I, index, candidates=35, atol=1e-6)
    with pytest.raises(AssertionError):
      agrees(rankings[user]['dense'], cosines_UT[user - 1, index.trie.texts_I], index, candidates=35, atol=1e-6)


def test_a_wide_beam_ranks_by_likelihood(rank, index, likelihoods):
  for user, found in enumerate(rank(index, ('constrained',))):
    agrees(found['constrained'], likelihoods[user], index)
    with pytest.raises(AssertionError):
      agrees(found['constrained'], likelihoods[user - 1], index)


def test_a_shortlist_is_ranked_by_likelihood(rank, index, likelihoods):
  for shortlist in ('dense', 'bm25'):
    rankings = rank(index, (shortlist, 'likelihood'), shortlist=shortlist, shortlist_size=5, candidates=3)
    for user, found in enumerate(rankings):
      listed = found[shortlist].items[:5]
      assert len(found[shortlist].items) >= 5  # more than the candidates, as they are a shortlist; and ties
      shares_text = np.isin(index.trie.texts_I, index.trie.texts_I[listed])
      agrees(found['likelihood'], np.where(shares_text, likelihoods[user], -np.inf), index, candidates=5)


def test_likelihood_may_be_a_tokens(rank, index, likelihoods):
  lengths_I = index.trie.lengths_T[index.trie.texts_I] + 1
  assert len(set(lengths_I.tolist())) > 1
  for user, found in enumerate(rank(index, ('likelihood',), length_normalised=True)):
    agrees(found['likelihood'], likelihoods[user] / lengths_I, index, candidates=35)


def reciprocal(user, names, weights=None):
  """An item's fused score, by a plain loop."""
  scores = {}
  for name in names:
    ranked = user[name]
    for item, score in zip(ranked.items.tolist(), ranked.scores.tolist(), strict=True):
      first_place = 1 + sum(other > score for other in ranked.scores.tolist())
      scores[item] = scores.get(item, 0) + (weights or {}).get(name, 0 if weights else 1) / (60 + first_place)
  return scores


def test_fused_is_the_sum_of_reciprocal_ranks(rank, rankings, index, tmp_path):
  weights = {'dense': 0.25, 'bm25': 2.0, 'nobody': 9.0}
  rank_fusion.write_weights(tmp_path, {'weights': weights})
  for names, found, given in (
      (RANKERS[:-1], rankings, None), (('bm25', 'dense'), rank(index, ('fused', 'dense', 'bm25')), None),
      (('bm25', 'dense'), rank(index, ('dense', 'bm25', 'fused'), fusion=str(tmp_path)), weights)):
    for user in found:
      wanted = reciprocal(user, names, given)
      assert set(user['fused'].items.tolist()) == set(wanted)
      np.testing.assert_allclose(user['fused'].scores, [wanted[item] for item in user['fused'].items.tolist()])
      assert (np.diff(user['fused'].scores) <= 0).all()
  alone = rank(index, ('fused',))
  for mine, theirs in zip(alone, rankings, strict=True):  # alone it fuses all
    assert mine.keys() == {'fused'}
    np.testing.assert_array_equal(mine['fused'].items, theirs['fused'].items)


def test_items_of_one_text_are_tied_and_all_listed(rank, rankings, index):
  twins = [index.item_numbers['rare-1'], index.item_numbers['rare-2']]
  for user in rankings:
    for name, ranked in user.items():
      at = np.flatnonzero(np.isin(ranked.items, twins))
      assert len(at) == 2 and ranked.scores[at[0]] == ranked.scores[at[1]], name
  ranked = rank(index, ('bm25',), candidates=1)[1]['bm25']
  assert sorted(ranked.items.tolist()) == twins and ranked.scores[0] == ranked.scores[1]


def test_twins_share_their_text_by_purchases(loaded, index, prefix, rankings):
  """P(item | text) by a plain loop; the probabilities of a text's items are the text's."""
  counts_I = np.random.default_rng(0).integers(0, 9, len(index.catalogue))
  texts = index.trie.texts_I.tolist()
  shares = [(count + 0.5) / sum(other + 0.5 for other, of in zip(counts_I, texts, strict=True) if of == text)
            for count, text in zip(counts_I, texts, strict=True)]
  options = RankerOptions(**OPTIONS | {'candidates': 40}, duplicates='purchases', temperature=0.2)
  found = Rankers(loaded, index, RANKERS[1:4], options, counts_I).rank(prefix, None)
  tied = Rankers(loaded, index, RANKERS[1:4], dataclasses.replace(options, duplicates='tied')).rank(prefix, None)
  for mine, theirs in zip(found, tied, strict=True):
    for name, nat in (('constrained', 1), ('dense', 0.2), ('likelihood', 1)):
      of_text = dict(zip(theirs[name].items.tolist(), theirs[name].scores.tolist(), strict=True))
      assert set(mine[name].items.tolist()) == set(of_text) and (np.diff(mine[name].scores) <= 0).all()
      wanted = [of_text[item] + nat * np.log(shares[item]) for item in mine[name].items.tolist()]
      np.testing.assert_allclose(mine[name].scores, wanted, rtol=1e-6)
      assert not np.allclose(mine[name].scores, theirs[name].scores)
  twins = [index.item_numbers['rare-1'], index.item_numbers['rare-2']]
  assert sum(shares[twin] for twin in twins) == pytest.approx(1) and shares[twins[0]] != shares[twins[1]]


def test_a_twin_that_nobody_buys_may_be_left_out_alone(loaded, index, prefix):
  twins = [index.item_numbers['rare-1'], index.item_numbers['rare-2']]
  counts_I = np.zeros(len(index.catalogue))
  counts_I[twins[1]] = 1e6
  options = RankerOptions(**OPTIONS | {'candidates': 40}, duplicates='purchases')
  dense = lambda options: Rankers(loaded, index, ('dense',), options, counts_I).rank(prefix, None)[0]['dense'].items.tolist()
  whole = dense(options)
  place = whole.index(twins[1])
  assert whole.index(twins[0]) > place + 1  # tied, it would come with the other one
  assert dense(dataclasses.replace(options, candidates=place + 1)) == whole[:place + 1]


def test_dense_may_count_how_often_a_text_is_bought(loaded, index, prefix):
  """cosine + τ · w · log P(text) over the whole catalogue, the shares by plain loops."""
  counts_I = np.random.default_rng(1).integers(0, 9, len(index.catalogue))
  texts = index.trie.texts_I.tolist()
  bought = [sum(count + 0.5 for count, of in zip(counts_I, texts, strict=True) if of == text) for text in texts]
  options = RankerOptions(**OPTIONS | {'candidates': 6}, temperature=0.2)
  everything = dataclasses.replace(options, candidates=len(texts))
  for mine, cosines in zip(Rankers(loaded, index, ('dense',), dataclasses.replace(options, popularity=0.4), counts_I).rank(
      prefix, None), Rankers(loaded, index, ('dense',), everything).rank(prefix, None), strict=True):
    scores_I = np.empty(len(texts))
    scores_I[cosines['dense'].items] = cosines['dense'].scores
    scores_I += 0.2 * 0.4 * np.log(np.asarray(bought) / (counts_I + 0.5).sum())
    agrees(mine['dense'], scores_I, index, candidates=6)
    assert set(mine['dense'].items.tolist()) != set(cosines['dense'].items[:len(mine['dense'].items)].tolist())


@pytest.mark.parametrize(('name', 'value'), [('duplicates', 'purchases'), ('popularity', 0.4)])
def test_purchases_have_to_be_known(loaded, index, name, value):
  with pytest.raises(UserError, match=f'rankers.{name} = {value!r}: no purchases are known here, .*; set it to '):
    Rankers(loaded, index, ('dense',), RankerOptions(**{name: value}))


def test_where_no_text_matches_no_more_than_the_candidates_are_listed(loaded, index, prefix):
  rankers = Rankers(loaded, index, ('bm25',), RankerOptions(candidates=5))
  found = rankers.rank(prefix, [(['', '?'], [-1.0, -2.0])] * 2)
  assert [len(user['bm25'].items) for user in found] == [5, 5] and not found[0]['bm25'].scores.any()


# Filters.


def only(index, item_ids):
  """bool [U, I], the same for all users."""
  return np.tile(np.isin(index.catalogue.item_ids, item_ids), (len(USERS), 1))


def test_a_category_of_three_gives_those_three(rank, index):
  for user in rank(index, RANKERS, only(index, ['rare-1', 'rare-2', 'rare-3'])):
    for name, ranked in user.items():
      assert {index.catalogue.item_ids[item] for item in ranked.items} == {'rare-1', 'rare-2', 'rare-3'}, name


def test_each_user_has_a_filter_and_of_twins_one_may_be_allowed(rank, index):
  allowed = (['rare-2', 'books-1'], ['games-3', 'rare-1', 'games-4'])
  allowed_UI = np.stack([np.isin(index.catalogue.item_ids, item_ids) for item_ids in allowed])
  for user, item_ids in zip(rank(index, RANKERS, allowed_UI), allowed, strict=True):
    for name, ranked in user.items():
      assert sorted(index.catalogue.item_ids[item] for item in ranked.items) == sorted(item_ids), name


def test_a_filter_ranks_as_an_index_of_the_allowed_items_does(catalogue, loaded, index, rank):
  """But for BM25: the weights of words are those of the whole catalogue, and its scores are scaled over the allowed items."""
  kept = [number for number in range(len(catalogue[0])) if number % 3 or number > 30]
  ids, items = ([part[number] for number in kept] for part in catalogue)
  allowed_UI = only(index, ids)
  names = ('bm25', 'constrained', 'dense', 'likelihood')
  # There are fewer texts than the shortlist has places: all are scored.
  alone = rank(build_index(ids, items, loaded), names)
  filtered, unfiltered = rank(index, names, allowed_UI), rank(index, ('constrained',))
  for user, (mine, theirs) in enumerate(zip(filtered, alone, strict=True)):
    for name in names[1:]:
      assert [index.catalogue.item_ids[item] for item in mine[name].items] == [ids[item] for item in theirs[name].items], name
      np.testing.assert_allclose(mine[name].scores, theirs[name].scores, rtol=1e-5, atol=1e-4)
    texts, logprobs = TEXTS[user]
    scores_I = np.full(len(index.catalogue), -np.inf)
    scores_I[kept] = quasi_round_robin(index.bm25.scores(texts)[:, kept], logprobs)
    agrees(mine['bm25'], scores_I, index, candidates=len(kept) - 1, atol=0)
    # A filter after the search would have lost some.
    assert np.isin(unfiltered[user]['constrained'].items[:8], kept).sum() < 8


# Bad input.


@pytest.mark.parametrize(('options', 'told'), [
    ({'candidates': 0}, 'rankers.candidates = 0'), ({'beam_width': -1}, 'rankers.beam_width = -1'),
    ({'shortlist_size': 0}, 'rankers.shortlist_size = 0'), ({'shortlist': 'fused'}, "rankers.shortlist = 'fused'"),
    ({'epsilon': -1.0}, 'epsilon = -1.0'), ({'popularity': -0.1}, 'rankers.popularity = -0.1'),
    ({'duplicates': 'best'}, "rankers.duplicates = 'best'"),
    ({'temperature': 0.0}, 'rankers.temperature = 0.0'),
    ({'duplicates': 'purchases', 'length_normalised': True}, 'leave one of them out')])
def test_options_out_of_range_are_named(options, told):
  with pytest.raises(UserError, match=told):
    RankerOptions(**options)


def test_names_are_checked():
  assert check_names('dense') == ('dense',) and check_names(['fused', 'bm25']) == ('fused', 'bm25')
  for names in ((), ('bm25', 'bm25'), ('bm25', 'popular'), 'popular'):
    with pytest.raises(UserError, match='name each once, out of bm25, constrained, dense, likelihood, fused'):
      check_names(names)


def test_what_runs_is_what_is_needed():
  assert needed_by(('likelihood',), 'dense') == {'likelihood', 'dense'} and needed_by(('likelihood',), 'all') == {'likelihood'}
  assert needed_by(('bm25', 'fused'), 'dense') == {'bm25', 'fused'} and needed_by(('fused',), 'all') == set(RANKERS)


def test_an_index_without_embeddings_cannot_be_searched_by_them(loaded, index, prefix):
  bare = dataclasses.replace(index, texts_TD=None)
  for name in ('dense', 'likelihood', 'fused'):
    with pytest.raises(UserError, match='no embeddings'):
      Rankers(loaded, bare, (name,))
  rankers = Rankers(loaded, bare, ('bm25', 'likelihood'), RankerOptions(**OPTIONS, shortlist='bm25'))
  assert rankers.samples and len(rankers.rank(prefix, TEXTS)) == 2
  assert not Rankers(loaded, index, ('dense',)).samples


def test_weights_of_other_rankers_are_refused(loaded, index, tmp_path):
  rank_fusion.write_weights(tmp_path, {'weights': {'dense': 1.0, 'bm25': 0.0}})
  with pytest.raises(UserError, match='no weight for bm25, constrained, which are to be fused; it is of dense, bm25'):
    Rankers(loaded, index, ('fused', 'constrained', 'bm25'), RankerOptions(fusion=str(tmp_path)))


def test_a_model_that_has_diverged_is_named(loaded, index, prefix):
  broken = prefix.replace(user_UD=prefix.user_UD * np.nan)
  with pytest.raises(UserError, match='not finite'):
    Rankers(loaded, index, ('bm25',)).rank(broken, TEXTS)
