"""What a run reads: data sets by the name of a Task or Mixture, at the Mixture's rates, split by split."""

import json

import numpy as np
import pytest
import tiny
from scipy import stats

from calrec_jax.data import histories
from calrec_jax.errors import UserError
from calrec_jax.text.batches import BatchPlan, RowOptions


def test_a_mixture_is_all_data_sets_at_the_rate_of_their_size(tiny_store):
  sources = tiny.inputs(tiny_store).load()
  assert [source.histories.name for source in sources] == ['books', 'games']
  assert sources[0].rate / sources[1].rate == pytest.approx((40 / 30) ** 0.3)
  assert [len(source.item_tokens.offsets) - 1 for source in sources] == [16, 16]


def test_a_task_is_one_data_set(tiny_store):
  source, = tiny.inputs(tiny_store, 'games').load()
  assert source.histories.name == 'games' and source.rate == 1


def test_the_mixture_and_its_exponent_may_be_chosen(tiny_store):
  assert [s.histories.name for s in tiny.inputs(tiny_store, mixture=('games',)).load()] == ['games']
  even = tiny.inputs(tiny_store, exponent=0.0).load()
  assert even[0].rate == even[1].rate


USERS = {'large': 400, 'middle': 60, 'small': 9}


@pytest.fixture(scope='module')
def three(tmp_path_factory, tiny_store):
  """Three data sets of very different sizes, and the tiny store's vocabulary."""
  folder = tmp_path_factory.mktemp('three')
  for name, users in USERS.items():
    (folder / 'data' / name).mkdir(parents=True)
    histories.write(folder / 'data' / name, tiny.make_histories(name, users=users), {})
  (folder / 'vocabulary.json').write_bytes((tiny_store / 'vocabulary.json').read_bytes())
  return folder


@pytest.mark.parametrize('mixture', [('large', 'small'), ['small', 'large'], ('large', 'middle', 'small'), None])
@pytest.mark.parametrize('exponent', [0.3, 1, 0, -0.5])
def test_the_rates_are_powers_of_the_users_and_sum_to_one(three, mixture, exponent):
  sources = tiny.inputs(three, mixture=mixture, exponent=exponent).load()
  weights = {name: USERS[name] ** exponent for name in sorted(mixture or USERS)}
  assert {s.histories.name: s.rate for s in sources} == pytest.approx(
      {name: weight / sum(weights.values()) for name, weight in weights.items()}, rel=1e-6)
  assert sum(source.rate for source in sources) == pytest.approx(1)


def counts_of_draws(inputs, n_windows: int) -> dict[str, int]:
  """How many histories of each data set the first windows of training hold."""
  plan = BatchPlan(inputs.corpus(inputs.load(), 'train'), batch_size=16, length=inputs.length,
                   options=RowOptions(window_steps=8), seed=0)
  users = [user for step in range(8 * n_windows) for user in plan.example_ids(step)]
  return {name: sum(user.startswith(name) for user in users) for name in USERS}


def p_value(counts: dict[str, int], exponent: float) -> float:
  """Of a chi-square test that the histories are drawn at rates (number of users)^exponent."""
  weights = np.array([users ** exponent for users in USERS.values()])
  observed = np.array([counts[name] for name in USERS])
  return stats.chisquare(observed, weights / weights.sum() * observed.sum()).pvalue


def test_histories_are_drawn_at_the_rates(three):
  counts = counts_of_draws(tiny.inputs(three), 20)
  assert sum(counts.values()) > 1000
  assert p_value(counts, 0.3) > 0.05
  assert p_value(counts, 0.4) < 1e-3 and p_value(counts, 0.2) < 1e-3 and p_value(counts, 1) < 1e-9  # the mutants


def test_the_rates_are_shown_and_recorded(three, tmp_path, caplog):
  with caplog.at_level('INFO'):
    tiny.train(three, tmp_path / 'run', inputs=tiny.inputs(three, mixture=('small', 'large')), train_steps=1,
               schedule=tiny.Schedule(log_every=1, eval_every=0, eval_histories=0))
  weights = {name: USERS[name] ** 0.3 for name in ('large', 'small')}
  rates = {name: weight / sum(weights.values()) for name, weight in weights.items()}
  assert ('stage1_mixture: 2 data sets, at rates (number of users)^0.3\n'
          f'  large  400 users  rate {rates["large"]:.4f}\n'
          f'  small    9 users  rate {rates["small"]:.4f}') in caplog.messages
  facts = json.loads((tmp_path / 'run/run.json').read_text())
  assert facts['users'] == {'large': 400, 'small': 9} and facts['rates'] == pytest.approx(rates, rel=1e-6)


def test_a_single_category_has_rate_one(three):
  for options in ({'name': 'small'}, {'mixture': ('small',)}):
    inputs = tiny.inputs(three, **options)
    sources = inputs.load()
    assert [(source.histories.name, source.rate) for source in sources] == [('small', 1)]
    first, row = inputs.shares(sources).splitlines()
    assert row == '  small  9 users  rate 1.0000'
    assert first == ('small: 1 data set' if 'name' in options else
                     'stage1_mixture: 1 data set, at rates (number of users)^0.3')


def test_a_mixture_of_names_that_are_not_there(three):
  with pytest.raises(UserError, match="names 'smal', which are not data sets; DATA_DIR has large, middle, small"):
    tiny.inputs(three, mixture=('large', 'smal')).load()


@pytest.mark.parametrize('changes, message', [
    ({'mixture': ('small')}, r"inputs.mixture = 'small': .*\('gift_cards',\)"), ({'mixture': ()}, 'inputs.mixture'),
    ({'mixture': (1, 2)}, 'inputs.mixture'), ({'exponent': float('nan')}, 'inputs.exponent = nan'),
    ({'exponent': '0.3'}, "inputs.exponent = '0.3'"), ({'exponent': 1e9}, 'inputs.exponent')])
def test_mixtures_and_exponents_that_are_none(three, changes, message):
  with pytest.raises(UserError, match=message):
    tiny.inputs(three, **changes)


def test_training_sees_neither_the_validation_nor_the_test_item(tiny_store):
  inputs = tiny.inputs(tiny_store, 'games')
  sources = inputs.load()
  data = sources[0].histories
  for split, held_out in (('train', 2), ('validation', 1), ('test', 0)):
    corpus = inputs.corpus(sources, split)
    for user in range(len(data.user_ids)):
      seen = corpus.events[corpus.offsets[user]:corpus.offsets[user + 1]]
      np.testing.assert_array_equal(seen, data.history(user)[:len(data.history(user)) - held_out])


def test_targets_cap_an_item_and_both_lengths_make_a_row(tiny_store):
  inputs = tiny.inputs(tiny_store, task_feature_lengths={'inputs': 20, 'targets': 6})
  corpus = inputs.corpus(inputs.load(), 'train')
  assert inputs.length == 26 and corpus.item_lengths.max() == 6 and corpus.cut['items_cut'] > 0


@pytest.mark.parametrize('lengths', [{'inputs': 8}, {'inputs': 8, 'targets': 0}, {'inputs': 8, 'targets': 8, 'x': 1}, {}])
def test_lengths_that_are_none(tiny_store, lengths):
  with pytest.raises(UserError, match='TASK_FEATURE_LENGTHS'):
    tiny.inputs(tiny_store, task_feature_lengths=lengths)


@pytest.mark.parametrize('changes, message', [
    ({'name': 'gmaes'}, "'gmaes'.*games"), ({'data_dir': '/nowhere'}, 'DATA_DIR = /nowhere'),
    ({'name': 'amazon_nothing'}, 'no such Task')])
def test_unknown_names(tiny_store, changes, message):
  with pytest.raises(UserError, match=message):
    tiny.inputs(tiny_store, **changes).load()


def test_a_category_of_the_method_that_was_not_prepared(tiny_store):
  from calrec_jax.tasks.categories import CATEGORIES
  with pytest.raises(UserError, match='prepare|no such folder'):
    tiny.inputs(tiny_store, sorted(CATEGORIES)[0]).load()


def test_the_description_tells_what_the_data_was(tiny_store):
  inputs = tiny.inputs(tiny_store, 'games')
  sources = inputs.load()
  assert inputs.description(sources) == {
      'mixture_or_task_name': 'games', 'vocabulary': inputs.vocabulary.fingerprint,
      'template': {'fields': ['title', 'category', 'brand', 'price'], 'unknown': 'write'},
      'task_feature_lengths': tiny.LENGTHS, 'data': {'games': sources[0].histories.fingerprint}, 'rates': {'games': 1.0}}
