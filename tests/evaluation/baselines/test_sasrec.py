"""SASRec sees the past of one history only, learns from train parts only, and is the same each time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import sasrec, sasrec_model
from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.evaluation.protocols import Protocol
from calrec_jax.evaluation.rankings import place

N_ITEMS = 12
TINY = sasrec.SasrecOptions(
  dim=16, layers=2, heads=2, dropout=0.1, max_length=8, batch_size=8, learning_rate=0.01, max_epochs=2)
OTHER_ITEM = 5


def store(histories: list[list[int]]) -> Histories:
  return Histories('cycle', [f'u{n}' for n in range(len(histories))], [f'i{n}' for n in range(N_ITEMS)], [{}] * N_ITEMS,
                   np.cumsum([0, *map(len, histories)]), np.concatenate(histories).astype(np.int32))


@pytest.fixture(scope='module')
def cycle() -> Histories:
  """Forty users who go round the items in order, from 5 to 11 of them; the successor is certain."""
  rng = np.random.default_rng(0)
  return store([(rng.integers(N_ITEMS) + np.arange(rng.integers(5, 12))) % N_ITEMS for _ in range(40)])


@pytest.fixture(scope='module')
def trained(cycle) -> sasrec.Trained:
  return sasrec.train(cycle, TINY, progress=False)


def with_changed(histories: Histories, *places: int) -> Histories:
  """The same data, but for the events at these places of each history."""
  events = histories.events.copy()
  for user, start in enumerate(histories.offsets[:-1]):
    for at in places:
      place_ = start + at if at >= 0 else histories.offsets[user + 1] + at
      events[place_] = (events[place_] + OTHER_ITEM) % N_ITEMS
  return dataclasses.replace(histories, events=events)


def all_scores(histories, split, trained) -> np.ndarray:
  scorer = sasrec.scorer(histories, split, trained=trained, progress=False)
  return np.array([scorer(user) for user in range(len(histories.user_ids))])


@pytest.fixture(scope='module')
def network():
  """A network with random parameters, as a function of one packed batch."""
  model = sasrec_model.Sasrec(N_ITEMS, max_length=8, dim=16, layers=2, heads=2, dropout=0.5)
  params = model.init(jax.random.key(0), *np.zeros((3, 1, 8), np.int32))['params']
  params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  def encode(*packed):
    apply = jax.jit(lambda *packed: model.apply({'params': params}, *packed))  # a new one, which knows of mutants
    return np.asarray(apply(*(np.array(x, np.int32) for x in packed)))

  return encode


def check_causal(network):
  items_BL, ones_BL, positions_BL = [[3, 1, 4, 1, 5, 9, 2, 6]], [[1] * 8], [list(range(8))]
  before_LD = network(items_BL, ones_BL, positions_BL)[0]
  changed_LD = network([[3, 1, 4, 1, 5, 8, 2, 6]], ones_BL, positions_BL)[0]
  np.testing.assert_array_equal(before_LD[:5], changed_LD[:5])
  assert np.abs(before_LD[5:] - changed_LD[5:]).max(1).min() > 1e-3  # all that come after do see it


def check_apart(network):
  """Two histories in a row are as each alone, wherever they lie, and padding is as nothing."""
  packed_LD = network([[3, 1, 4, 1, 5, 9, 0, 0]], [[1, 1, 1, 2, 2, 2, 0, 0]], [[0, 1, 2, 0, 1, 2, 0, 0]])[0]
  first_LD = network([[3, 1, 4, 7, 7, 7, 7, 7]], [[1, 1, 1, 0, 0, 0, 0, 0]], [[0, 1, 2, 3, 4, 5, 6, 7]])[0]
  second_LD = network([[7, 7, 7, 7, 7, 1, 5, 9]], [[0, 0, 0, 0, 0, 1, 1, 1]], [[0, 0, 0, 0, 0, 0, 1, 2]])[0]
  np.testing.assert_allclose(packed_LD[:3], first_LD[:3], atol=1e-5)
  np.testing.assert_allclose(packed_LD[3:6], second_LD[5:], atol=1e-5)
  assert np.isfinite(first_LD).all() and np.isfinite(second_LD).all()


@pytest.mark.parametrize(('check', 'mutant'), [
  (check_causal, lambda segments_BL: segments_BL[:, :, None] == segments_BL[:, None, :]),
  (check_apart, lambda segments_BL: jnp.tril(jnp.ones((*segments_BL.shape, segments_BL.shape[1]), bool))),
], ids=['causal', 'apart'])
def test_a_position_sees_the_past_of_its_own_history(network, check, mutant, monkeypatch):
  check(network)
  monkeypatch.setattr(sasrec_model, 'causal_mask', mutant)
  with pytest.raises(AssertionError):  # the mask without the one condition is seen
    check(network)


def test_the_order_of_items_matters(network):
  positions_BL, ones_BL = [[0, 1, 2, 3, 4, 5, 6, 7]], [[1] * 8]
  one_LD = network([[3, 1, 4, 0, 5, 9, 2, 6]], ones_BL, positions_BL)[0]
  other_LD = network([[1, 3, 4, 0, 5, 9, 2, 6]], ones_BL, positions_BL)[0]
  assert np.abs(one_LD[2:] - other_LD[2:]).max() > 1e-3


def test_rows_are_those_of_the_docstring():
  rows = sasrec.pack(np.array([4, 7, 9]), np.array([3, 2, 1]), 4)
  np.testing.assert_array_equal(rows.index_RL, [[4, 5, 6, 0], [7, 8, 9, 0]])
  np.testing.assert_array_equal(rows.segments_RL, [[1, 1, 1, 0], [2, 2, 3, 0]])
  np.testing.assert_array_equal(rows.positions_RL, [[0, 1, 2, 0], [0, 1, 0, 0]])
  np.testing.assert_array_equal(rows.row_S, [0, 1, 1])
  np.testing.assert_array_equal(rows.last_S, [2, 1, 2])


def test_a_last_batch_is_filled_with_padding():
  rows = sasrec.pack(np.arange(3), np.full(3, 4), 4)
  (_, *first), (which, index_BL, segments_BL, _) = rows.batches(2)
  assert which.start == 2 and index_BL.shape == (2, 4)
  np.testing.assert_array_equal(segments_BL, [[3] * 4, [0] * 4])


def test_the_loss_is_the_cross_entropy():
  logits_NI = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32) * 3
  labels_N, real_N = np.array([2, 6, 0, 3]), np.array([True, True, False, True])
  softmax_NI = np.exp(logits_NI) / np.exp(logits_NI).sum(1, keepdims=True)
  nll_N = -np.log(softmax_NI[np.arange(4), labels_N])
  loss = lambda logits_NI: sasrec_model.mean_nll(logits_NI, labels_N, real_N)
  np.testing.assert_allclose(loss(logits_NI), nll_N[real_N].mean(), rtol=1e-6)
  grad_NI = np.asarray(jax.grad(loss)(logits_NI))
  np.testing.assert_allclose(grad_NI, (softmax_NI - np.eye(7)[labels_N]) * real_N[:, None] / 3, atol=1e-6)
  assert sasrec_model.mean_nll(logits_NI, labels_N, np.zeros(4, bool)) == 0


def test_a_certain_successor_is_learned(cycle):
  trained = sasrec.train(cycle, dataclasses.replace(TINY, max_epochs=30, patience=30), progress=False)
  for split in ('validation', 'test'):
    top_U = all_scores(cycle, split, trained).argmax(1)
    targets_U = [cycle.seen(user, split)[-1] for user in range(40)]
    assert (top_U == targets_U).mean() >= 0.95


def test_scores_are_products_with_the_vector_of_each_context_alone(cycle, trained):
  model = sasrec_model.Sasrec(N_ITEMS, TINY.max_length, TINY.dim, TINY.layers, TINY.heads, TINY.dropout)
  encode, positions_BL = jax.jit(model.apply), np.arange(TINY.max_length)[None]
  scores_UI = all_scores(cycle, 'test', trained)
  assert scores_UI.dtype == np.float64 and scores_UI.shape == (40, N_ITEMS)
  for user in range(40):
    context = cycle.seen(user, 'test')[:-1][-TINY.max_length:]
    n, rest = len(context), TINY.max_length - len(context)  # padded on the right, for one compilation
    segments_BL = np.pad(np.ones((1, n), int), ((0, 0), (0, rest)))
    alone_LD = encode({'params': trained.params}, np.pad(context, (0, rest))[None], segments_BL, positions_BL)[0]
    np.testing.assert_allclose(scores_UI[user], trained.params['items'] @ alone_LD[n - 1], atol=1e-5)


@pytest.mark.parametrize('seen_items', ['kept', 'filtered'])
def test_the_best_epoch_is_kept_and_measured_as_the_protocol_does(cycle, seen_items):
  options = dataclasses.replace(TINY, max_epochs=30, patience=2)
  protocol = Protocol(split='validation', seen_items=seen_items)
  candidates = None if seen_items == 'kept' else functools.partial(protocol.candidates, cycle)
  trained = sasrec.train(cycle, options, candidates=candidates, progress=False)
  ndcg = [epoch['ndcg@10'] for epoch in trained.epochs]
  assert trained.best_epoch == int(np.argmax(ndcg)) and len(ndcg) == trained.best_epoch + 1 + 2 < 30
  scorer = sasrec.scorer(cycle, 'validation', trained=trained)
  places = [place(scorer(user).astype(np.float32), cycle.seen(user, 'validation')[-1], protocol.candidates(cycle, user))
            for user in range(40)]
  for name, value_U in expected_metrics(*np.array(places).T).items():
    np.testing.assert_allclose(trained.epochs[trained.best_epoch][name], value_U.mean(), rtol=1e-6)
  until_then = sasrec.train(cycle, dataclasses.replace(options, max_epochs=trained.best_epoch + 1), candidates=candidates,
                            progress=False)
  jax.tree.map(np.testing.assert_array_equal, trained.params, until_then.params)


def test_equal_seeds_give_equal_bits(cycle, trained):
  again = sasrec.train(cycle, TINY, progress=False)
  np.testing.assert_array_equal(all_scores(cycle, 'test', trained), all_scores(cycle, 'test', again))
  assert again.epochs == trained.epochs
  other = sasrec.train(cycle, dataclasses.replace(TINY, seed=1), progress=False)
  assert np.abs(all_scores(cycle, 'test', other) - all_scores(cycle, 'test', trained)).max() > 1e-2


def check_blind(cycle):
  """One epoch, so that the validation events have no say in which is kept."""
  options = dataclasses.replace(TINY, max_epochs=1)
  one_UI, other_UI = (all_scores(histories, 'validation', sasrec.train(histories, options, progress=False))
                      for histories in (cycle, with_changed(cycle, -1, -2)))
  np.testing.assert_array_equal(one_UI, other_UI)


def test_held_out_events_teach_nothing(cycle, monkeypatch):
  check_blind(cycle)
  visible = Histories.visible
  monkeypatch.setattr(Histories, 'visible', lambda self, split: visible(self, 'test' if split == 'train' else split))
  with pytest.raises(AssertionError):  # the mutant that learns from whole histories is seen
    check_blind(cycle)


def test_test_targets_change_nothing_and_validation_events_are_context_of_the_test(cycle, trained):
  other = with_changed(cycle, -1)
  assert sasrec.train(other, TINY, progress=False).epochs == trained.epochs
  np.testing.assert_array_equal(all_scores(cycle, 'test', trained), all_scores(other, 'test', trained))
  seen_U = np.abs(all_scores(cycle, 'test', trained) - all_scores(with_changed(cycle, -2), 'test', trained)).max(1)
  assert (seen_U > 1e-3).all()


def test_of_a_long_history_the_latest_events_are_read():
  histories = store([np.arange(14) % N_ITEMS, np.arange(3, 16) % N_ITEMS])  # the inputs are 11 and 10 events
  options = dataclasses.replace(TINY, max_epochs=1)
  one, other = (sasrec.train(one, options, progress=False) for one in (histories, with_changed(histories, 0, 1)))
  for split in ('validation', 'test'):
    np.testing.assert_array_equal(all_scores(histories, split, one), all_scores(with_changed(histories, 0, 1), split, other))


def test_users_without_a_context_score_zero(trained):
  histories = store([[3], [3, 4, 5, 6, 7]])
  np.testing.assert_array_equal(all_scores(histories, 'test', trained)[0], 0)
  assert np.abs(all_scores(histories, 'test', trained)[1]).max() > 0


def test_nothing_to_learn_from_is_told():
  with pytest.raises(UserError, match=r'^data set cycle: no train part has two events, so SASRec has nothing to learn from; '):
    sasrec.train(store([[0, 1, 2], [3]]), TINY, progress=False)


def test_without_a_validation_target_nobody_knows_when_to_stop(cycle):
  timed = dataclasses.replace(cycle, timestamps=np.arange(len(cycle.events)), cutoffs=(10**6, 2 * 10**6))
  with pytest.raises(UserError, match=r'^data set cycle: no user has a validation target, '):
    sasrec.train(timed, TINY, progress=False)


def test_of_a_split_by_time_only_what_was_before_is_learned(cycle):
  """Users of later events than the cutoff are held out as a whole: their items are read as contexts, not learned from."""
  n_before = int(cycle.offsets[30])
  timed = dataclasses.replace(cycle, timestamps=np.arange(len(cycle.events)), cutoffs=(n_before - 2, len(cycle.events) - 3))
  other = dataclasses.replace(timed, events=np.append(timed.events[:n_before], (timed.events[n_before:] + 1) % N_ITEMS))
  options = dataclasses.replace(TINY, max_epochs=1)
  one, two = (sasrec.train(histories, options, progress=False) for histories in (timed, other))
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
  judged = np.flatnonzero(timed.visible('validation') > 1)
  assert list(judged) == [29] and (all_scores(timed, 'validation', one)[judged] != 0).any()


def test_a_loss_that_is_no_number_is_told(cycle, monkeypatch):
  monkeypatch.setattr(sasrec, '_train_step', lambda *args: (args[2], np.float32('nan')))
  with pytest.raises(UserError, match=r'^sasrec: the loss is nan in epoch 0; lower learning_rate = 0\.01\.$'):
    sasrec.train(cycle, TINY, progress=False)


@pytest.mark.parametrize(('option', 'message'), [
  ({'dim': 0}, 'sasrec dim = 0: give at least 1.'),
  ({'patience': 0}, 'sasrec patience = 0: give at least 1.'),
  ({'dropout': 1.0}, 'sasrec dropout = 1.0: give a number from 0 to below 1.'),
  ({'learning_rate': 0.0}, 'sasrec learning_rate = 0.0: give a number above 0.'),
  ({'learning_rate': float('nan')}, 'sasrec learning_rate = nan: give a number above 0.'),
  ({'weight_decay': -1.0}, 'sasrec weight_decay = -1.0: give a number from 0 up.'),
  ({'seed': -1}, 'sasrec seed = -1: give a number from 0 to below 2^32.'),
  ({'dim': 10, 'heads': 4}, 'sasrec dim = 10: not a multiple of heads = 4; change one of them.'),
])
def test_an_option_out_of_range_is_told_in_one_line(option, message):
  with pytest.raises(UserError) as error:
    sasrec.SasrecOptions(**option)
  assert str(error.value) == message
