"""Item-KNN is the formula: cosines of the items' user vectors, the nearest of them, summed over the context."""

import dataclasses

import numpy as np
import pytest
from test_baselines import check_blind

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import item_knn, popularity

N_ITEMS = 9


@pytest.fixture(scope='module')
def random_store() -> Histories:
  """Twelve users who buy 5 to 9 of nine items, some twice; the last item is in no history."""
  rng = np.random.default_rng(0)
  lengths_U = rng.integers(5, 10, 12)
  return Histories('random', [f'u{n}' for n in range(12)], [f'i{n}' for n in range(N_ITEMS)], [{}] * N_ITEMS,
                   np.concatenate([[0], np.cumsum(lengths_U)]), rng.integers(0, N_ITEMS - 1, lengths_U.sum()).astype(np.int32))


def cosine(one: set, other: set) -> float:
  return len(one & other) / np.sqrt(len(one) * len(other)) if one and other else 0.0


def by_the_formula(histories, user, end, neighbours, last_n):
  """The scores from sets of users, item by item."""
  train = [histories.history(u)[:-2].tolist() for u in range(len(histories.user_ids))]
  buyers = [{u for u, items in enumerate(train) if item in items} for item in range(N_ITEMS)]
  scores = [0.0] * N_ITEMS
  for item in histories.history(user)[:end].tolist()[-last_n if last_n else None:]:
    others = [(-cosine(buyers[item], buyers[other]), other) for other in range(N_ITEMS) if other != item]
    for negative, other in sorted(others)[:neighbours]:
      scores[other] -= negative
  return scores


@pytest.mark.parametrize(('split', 'end'), [('test', -1), ('validation', -2)])
@pytest.mark.parametrize('neighbours', [1, 3, 100])
@pytest.mark.parametrize('last_n', [1, 2, None])
def test_the_scores_are_those_of_the_formula(random_store, split, end, neighbours, last_n):
  scorer = item_knn.scorer(random_store, split, neighbours=neighbours, last_n=last_n)
  for user in range(12):
    scores_I = scorer(user)
    assert scores_I.dtype == np.float64 and scores_I.shape == (N_ITEMS,)
    np.testing.assert_allclose(scores_I, by_the_formula(random_store, user, end, neighbours, last_n), rtol=1e-12)


def test_all_similarities_are_the_matrix_of_cosines(random_store):
  bought_UI = np.zeros((12, N_ITEMS))
  for user in range(12):
    bought_UI[user, random_store.history(user)[:-2]] = 1
  norm_I = np.maximum(np.linalg.norm(bought_UI, axis=0), 1e-9)
  cosine_II = bought_UI.T @ bought_UI / norm_I[:, None] / norm_I[None]
  np.fill_diagonal(cosine_II, 0)
  np.testing.assert_allclose(item_knn.similarities(random_store).toarray(), cosine_II, rtol=1e-12)


def test_by_hand(shop):
  # Train parts: g1 h1 | g1 h1 h2 | g2 g1 h2. Buyers: g1 3, h1 2, h2 2, g2 1.
  similar_II = item_knn.similarities(shop).toarray()
  g1, g2, h1, h2 = (shop.item_ids.index(item_id) for item_id in ('g1', 'g2', 'h1', 'h2'))
  expected_II = np.zeros((6, 6))
  for one, other, value in ((g1, h1, 2 / 6**0.5), (g1, h2, 2 / 6**0.5), (g1, g2, 1 / 3**0.5), (h1, h2, 1 / 2),
                            (g2, h2, 1 / 2**0.5)):
    expected_II[one, other] = expected_II[other, one] = value
  np.testing.assert_allclose(similar_II, expected_II, rtol=1e-12)


@pytest.mark.parametrize('split', ['test', 'validation'])
def test_the_targets_change_nothing(shop, split, monkeypatch):
  check_blind(item_knn, shop, split)
  monkeypatch.setattr(popularity, 'in_train', lambda histories: np.ones(len(histories.events), bool))
  with pytest.raises(AssertionError):  # the mutant that counts all events is seen
    check_blind(item_knn, shop, split)


def test_a_user_without_a_context_scores_zero(shop):
  one_event = dataclasses.replace(shop, offsets=np.array([0, 1]), events=shop.events[:1], user_ids=['ann'])
  np.testing.assert_array_equal(item_knn.scorer(one_event, 'test')(0), np.zeros(6))


@pytest.mark.parametrize(('option', 'message'), [
  ({'neighbours': 0}, r'^item-KNN: neighbours = 0; give at least 1\.$'),
  ({'last_n': 0}, r'^item-KNN: last_n = 0; give at least 1, or None for all\.$'),
])
def test_an_option_out_of_range_is_told(shop, option, message):
  with pytest.raises(UserError, match=message):
    item_knn.scorer(shop, 'test', **option)
