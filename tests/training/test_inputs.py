"""What a run reads: data sets by the name of a Task or Mixture, at the Mixture's rates, split by split."""

import numpy as np
import pytest
import tiny

from calrec_jax.errors import UserError


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
