import inspect

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from calrec_jax.ranking import dense
from calrec_jax.ranking.dense import DenseIndex, unit

DIM = 24
BONUS_T = np.arange(600) % 5 / 4  # a few values, so that equal rows are tied still


@pytest.fixture(scope='module')
def texts_TD() -> np.ndarray:
  """600 embeddings of various lengths, many of them twice or more, far apart."""
  rng = np.random.default_rng(0)
  texts_TD = rng.standard_normal((600, DIM)).astype(np.float32)
  texts_TD[rng.permutation(600)[:300]] = texts_TD[rng.integers(0, 40, 300)]
  return texts_TD * 2.0**rng.integers(-2, 3, (600, 1)).astype(np.float32)  # exact, so that equal rows stay so


def users(n: int) -> np.ndarray:
  return np.random.default_rng(1).standard_normal((n, DIM)).astype(np.float32)


def mesh(*shape: int):
  return jax.make_mesh(shape, ('a', 'b')[:len(shape)], axis_types=(AxisType.Auto,) * len(shape),
                       devices=jax.devices()[:int(np.prod(shape))])


def brute_force(users_UD, texts_TD, k, allowed_UT=None, bonus_T=0.0):
  """By float64 scores and a stable sort; a score is computed once for equal rows."""
  rows, numbers = np.unique(unit(texts_TD), axis=0, return_inverse=True)
  scores_UT = (unit(users_UD).astype(np.float64) @ rows.T.astype(np.float64))[:, numbers.reshape(-1)] + bonus_T
  if allowed_UT is not None:
    scores_UT = np.where(allowed_UT, scores_UT, -np.inf)
  texts_UK = np.argsort(-scores_UT, axis=1, kind='stable')[:, :k].astype(np.int32)
  scores_UK = np.take_along_axis(scores_UT, texts_UK, axis=1)
  more = ((0, 0), (0, k - scores_UK.shape[1]))
  return (np.pad(scores_UK, more, constant_values=-np.inf),
          np.pad(np.where(scores_UK == -np.inf, -1, texts_UK), more, constant_values=-1))


def check(index, texts_TD, users_UD, k, allowed_UT=None, bonus_T=0.0):
  scores_UK, texts_UK = index.top_k(users_UD, k, allowed_UT)
  expected_UK, expected_texts_UK = brute_force(users_UD, texts_TD, k, allowed_UT, bonus_T)
  assert scores_UK.dtype == np.float32 and texts_UK.dtype == np.int32 and texts_UK.shape == (len(users_UD), k)
  np.testing.assert_allclose(scores_UK, expected_UK, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(texts_UK, expected_texts_UK)  # no two texts of the fixture are nearly tied


def mask(kind: str, n_users: int, n_texts: int) -> np.ndarray | None:
  rng = np.random.default_rng(2)
  return {'none': None, 'one': rng.random(n_texts) < 0.5, 'each': rng.random((n_users, n_texts)) < 0.3,
          'few': np.arange(n_texts) % 150 == 149, 'empty': np.zeros(n_texts, bool)}[kind]


@pytest.mark.parametrize('block', [1, 100, 352, 4096])
@pytest.mark.parametrize('k', [1, 7, 600, 700])
def test_equals_a_sort_at_any_block_and_k(texts_TD, block, k):
  check(DenseIndex(texts_TD, block=block), texts_TD, users(5), k)


@pytest.mark.parametrize('n_users', [0, 1, 3, 140])
@pytest.mark.parametrize('allowed', ['none', 'one', 'each', 'few', 'empty'])
def test_equals_a_sort_at_any_number_of_users_and_mask(texts_TD, n_users, allowed):
  check(DenseIndex(texts_TD, block=320), texts_TD, users(n_users), 9, mask(allowed, n_users, 600))


@pytest.mark.parametrize('shape', [(8,), (2, 4)])
@pytest.mark.parametrize('allowed', ['none', 'each', 'few'])
def test_devices_hold_parts_of_the_texts_and_find_the_same(texts_TD, shape, allowed):
  index = DenseIndex(texts_TD, mesh=mesh(*shape), block=32)
  assert len(index.blocks) == 3 and all(len(block.sharding.device_set) == 8 for block in index.blocks)
  assert {part.data.shape for part in index.blocks[0].addressable_shards} == {(32, DIM)}
  for n_users in (1, 5):
    allowed_UT = mask(allowed, n_users, 600)
    check(index, texts_TD, users(n_users), 9, allowed_UT)
    one = DenseIndex(texts_TD, mesh=mesh(1)).top_k(users(n_users), 9, allowed_UT)
    np.testing.assert_array_equal(index.top_k(users(n_users), 9, allowed_UT)[1], one[1])


@pytest.mark.parametrize('shape', [(1,), (4,)])
@pytest.mark.parametrize('allowed', ['none', 'each'])
def test_a_bonus_is_added_to_the_cosines(texts_TD, shape, allowed):
  index = DenseIndex(texts_TD, bonus_T=BONUS_T, mesh=mesh(*shape), block=320 // shape[0])
  check(index, texts_TD, users(40), 9, mask(allowed, 40, 600), BONUS_T)


def test_fewer_texts_than_devices(texts_TD):
  check(DenseIndex(texts_TD[:3], mesh=mesh(8)), texts_TD[:3], users(2), 5)


def test_a_large_catalogue_takes_all_devices(texts_TD, monkeypatch):
  assert DenseIndex(texts_TD).mesh.size == 1
  monkeypatch.setattr(dense, '_LARGE', 600)
  assert DenseIndex(texts_TD).mesh.size == 8


def test_a_row_of_zeros_scores_zero(texts_TD):
  scores_UK, texts_UK = DenseIndex(np.zeros((4, DIM), np.float32)).top_k(users(2), 3)
  np.testing.assert_array_equal(scores_UK, np.zeros((2, 3)))
  np.testing.assert_array_equal(texts_UK, [[0, 1, 2]] * 2)


def test_searches_of_like_sizes_share_a_program(texts_TD):
  index = DenseIndex(texts_TD, block=300)
  index.top_k(users(8), 11)
  compiled = dense._merge_on._cache_size()
  for n_users in (2, 5, 7):
    index.top_k(users(n_users), 11)
  assert dense._merge_on._cache_size() == compiled


@pytest.mark.parametrize(('law', 'mutant'), [
    ('jnp.where(allowed_UB, scores_UB, -jnp.inf)', 'scores_UB'),  # the mask ignored
    ('jnp.sort(lax.top_k(groups_UGB.max(axis=2), k)[1], axis=1)', 'lax.top_k(groups_UGB.max(axis=2), k)[1]'),
    ('groups_UGB.max(axis=2)', 'groups_UGB[:, :, 0]'),  # not a bound
    ('jnp.concatenate([best_UK, scores_UB], axis=1)', 'jnp.concatenate([best_UK, scores_UB], axis=1)[:, ::-1]'),
    ('texts_UC + firsts[None]', 'texts_UC'), ('scores_UB += bonus_B[None]', 'pass')])
def test_a_mutant_is_found(texts_TD, monkeypatch, law, mutant):
  source = inspect.getsource(dense._merge)
  assert source.count(law) == 1
  names = dict(vars(dense))
  exec(source.replace(law, mutant), names)
  allowed_UT = mask('each', 40, 600)
  monkeypatch.setattr(dense, '_merge', names['_merge'])
  dense._merge_on.clear_cache()
  try:
    with pytest.raises(AssertionError):
      check(DenseIndex(texts_TD, bonus_T=BONUS_T, block=320), texts_TD, users(40), 9, allowed_UT, BONUS_T)
  finally:
    dense._merge_on.clear_cache()


@pytest.mark.parametrize(('call', 'message'), [
    (lambda texts: DenseIndex(texts[0]), r'shape \(24,\)'),
    (lambda texts: DenseIndex(texts[:0]), r'shape \(0, 24\).*at least one text'),
    (lambda texts: DenseIndex(texts, block=0), 'block = 0'),
    (lambda texts: DenseIndex(texts, bonus_T=np.ones(599)), r'bonus has shape \(599,\); give a finite number for each of 600'),
    (lambda texts: DenseIndex(texts, bonus_T=np.full(600, np.nan)), 'give a finite number'),
    (lambda texts: DenseIndex(np.where(np.arange(600)[:, None] == 437, np.nan, texts), block=64), 'text 437 is not finite'),
    (lambda texts: DenseIndex(texts).top_k(users(2), 0), 'k = 0 texts; give at least 1'),
    (lambda texts: DenseIndex(texts).top_k(users(2)[:, :-1], 3), r'shape \(2, 23\); the texts ask for \[users, 24\]'),
    (lambda texts: DenseIndex(texts).top_k(users(2)[0], 3), r'shape \(24,\)'),
    (lambda texts: DenseIndex(texts).top_k(users(2) * np.inf, 3), 'user 0 is not finite'),
    (lambda texts: DenseIndex(texts).top_k(users(2), 3, np.ones((3, 600), bool)), r'bool\[3, 600\]; give bool\[600\]'),
    (lambda texts: DenseIndex(texts).top_k(users(2), 3, np.ones(600)), r'float64\[600\]; give bool')])
def test_bad_input_is_named(texts_TD, call, message):
  with pytest.raises(ValueError, match=message):
    call(texts_TD)
