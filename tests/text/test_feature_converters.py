"""The converter: the numbers of its docstring; a Task's rows hold what the histories' own rows hold."""

import collections
import inspect
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from toy_corpus import toy_vocabulary

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.tasks import registry
from calrec_jax.text import feature_converters
from calrec_jax.text.batches import OnePass, RowOptions
from calrec_jax.text.corpus import Source, build_corpus
from calrec_jax.text.feature_converters import CalRecFeatureConverter, batch_slots, item_runs, text_identity
from calrec_jax.text.item_tokens import item_tokens
from calrec_jax.text.rows import Shapes
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

TEMPLATE = ItemTemplate()
EXAMPLES = [([2, 7, 8, 3, 9, 3], [7, 8, 1]), ([2, 5, 6, 3], [9, 1])]


def vocabulary(**kwargs):
  stub = toy_vocabulary(**kwargs)
  stub.decode = lambda ids: '\nnext'
  return stub


def dataset(examples=EXAMPLES):
  spec = {name: tf.TensorSpec([None], tf.int32) for name in ('inputs', 'targets')}
  return tf.data.Dataset.from_generator(
      lambda: ({'inputs': inputs, 'targets': targets} for inputs, targets in examples), output_signature=spec)


def convert(converter, examples=EXAMPLES, inputs=13, targets=3):
  return list(converter(dataset(examples), {'inputs': inputs, 'targets': targets}).as_numpy_iterator())


def documented() -> dict[str, list[float]]:
  found = re.findall(r'^ *(\w+) +\[([-.\d ]+)\]$', inspect.getdoc(CalRecFeatureConverter), re.MULTILINE)
  return {name: [float(n) for n in numbers.split()] for name, numbers in found}


def check(row, expected):
  assert {name: np.round(array.astype(float), 3).tolist() for name, array in row.items()} == expected


def test_the_numbers_of_the_docstring():
  rows = convert(CalRecFeatureConverter(vocabulary(), alone_length=4, spans_per_row=2))
  assert len(rows) == 1
  check(rows[0], documented())
  with pytest.raises(AssertionError):  # the next prompt where the end should be
    check(rows[0] | {'labels': np.where(np.arange(16) == 4, 3, rows[0]['labels'])}, documented())


def test_one_example_a_row_without_packing():
  first, second = convert(CalRecFeatureConverter(vocabulary(bos=4), pack=False), inputs=8)
  a, b = text_identity([7, 8]), text_identity([9])
  check(first, {
      'tokens':       [4, 2, 7, 8, 3, 9, 3, 7, 8, 0, 0], 'labels':    [2, 7, 8, 1, 9, 1, 7, 8, 1, 0, 0],
      'segments':     [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], 'positions': [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0],
      'items':        [0, 0, 1, 1, 0, 2, 0, 3, 3, 0, 0],
      'loss_weights': [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
      'alone_tokens': [4, 7, 8, 0], 'alone_segments': [1, 1, 1, 0], 'alone_positions': [0, 1, 2, 0],
      'slot_texts': [a], 'span_segments': [1], 'span_items': [3], 'span_slots': [0], 'span_texts': [a],
      'span_log_shares': [-0.693]})
  assert second['tokens'].tolist() == [4, 2, 5, 6, 3, 9, 0, 0, 0, 0, 0] and second['span_texts'].tolist() == [b]


def test_rows_are_counted_where_each_example_is_one():
  counted = dataset().apply(tf.data.experimental.assert_cardinality(len(EXAMPLES)))
  rows = lambda examples, pack: CalRecFeatureConverter(vocabulary(), pack=pack)(examples, {'inputs': 13, 'targets': 3})
  assert len(rows(counted, pack=False)) == len(list(rows(counted, pack=False))) == 2
  for unknown in (rows(dataset(), pack=False), rows(counted, pack=True)):
    assert unknown.cardinality() == tf.data.UNKNOWN_CARDINALITY


def test_features_are_those_of_the_rows():
  converter, lengths = CalRecFeatureConverter(vocabulary(), spans_per_row=5), {'inputs': 20, 'targets': 4}
  shapes = converter.shapes(lengths)
  assert shapes == Shapes(B=1, L=24, M=12, E=5, S=5)
  spec = converter(dataset(), lengths).element_spec
  assert {name: ((1, *s.shape), s.dtype.as_numpy_dtype) for name, s in spec.items()} == shapes.features()


def test_longer_histories_keep_their_newest_whole_items_and_are_counted():
  long = ([2, 5, 3, 6, 6, 6, 6, 3, 7, 8, 3, 9, 3], [7, 8, 9, 1])
  converter = CalRecFeatureConverter(vocabulary(), apply_length_check=False)
  rows = convert(converter, [*EXAMPLES, long], inputs=9, targets=2)
  tokens = {tuple(row['tokens'].tolist()) for row in rows}
  assert (2, 7, 8, 3, 9, 3, 7, 8, 0, 0, 0) in tokens and (2, 6, 6, 3, 7, 8, 3, 9, 3, 7, 8) in tokens
  assert converter.report == {'histories': 3, 'histories_cut': 1, 'context_items_cut': 1, 'items_cut': 2,
                              'item_tokens_cut': 3}
  # The text that was cut is still another text than the one that it now looks like.
  texts = {text for row in rows for text in row['span_texts'].tolist()} - {0}
  assert texts == {text_identity(tokens) for tokens in ([7, 8], [9], [7, 8, 9])}


def test_an_endless_data_set_is_converted_as_it_comes():
  converter = CalRecFeatureConverter(vocabulary(), buffer_examples=3)
  rows = converter(dataset().repeat(), {'inputs': 13, 'targets': 3}).take(50).as_numpy_iterator()
  assert sum((row['span_texts'] > 0).sum() for row in rows) >= 50


def test_slots_of_a_batch():
  np.testing.assert_array_equal(batch_slots(np.array([[0, 1], [1, 0], [0, 0]], np.int32), 4), [[0, 1], [5, 4], [8, 8]])


def test_text_identities_are_fixed():
  assert (text_identity([7, 8]), text_identity([9])) == (591453634, 1708426696)  # in every process and version
  drawn = {text_identity([n, m]) for n in range(100) for m in range(100)}
  assert len(drawn) == 10_000 and min(drawn) > 0 and max(drawn) < 2**31


prompts = st.tuples(st.lists(st.integers(5, 7), min_size=1, max_size=3), st.lists(st.integers(5, 7), max_size=2))


@given(prompts, st.lists(st.lists(st.integers(4, 9), min_size=1, max_size=4), min_size=1, max_size=5))
def test_items_are_cut_at_the_prompts(prompts, items):
  first, following = prompts[0], [3, *prompts[1]]  # 3 holds the line break
  inputs = np.array(sum((item + following for item in items), first), np.int32)
  runs = item_runs(inputs, np.array(first), np.array(following))
  assert [inputs[start:stop].tolist() for start, stop in runs] == items


@pytest.mark.parametrize('inputs', [[], [2], [2, 7], [7, 3], [2, 7, 3, 8], [3, 7, 3]])
def test_other_inputs_are_refused(inputs):
  with pytest.raises(UserError, match='not a user part'):
    item_runs(np.array(inputs, np.int32), np.array([2]), np.array([3]))


def test_bad_options():
  with pytest.raises(UserError, match='alone_length = 4: a target may have 5 tokens'):
    CalRecFeatureConverter(vocabulary(bos=4), alone_length=4).shapes({'inputs': 20, 'targets': 4})
  stub = vocabulary()
  stub.decode = lambda ids: 'next'
  with pytest.raises(UserError, match='drops line breaks'):
    CalRecFeatureConverter(stub)


# A Task's rows against the histories' own.


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  """(name of a registered Task, its vocabulary, the corpus of its train split)."""
  rng = np.random.default_rng(0)
  items = [{'title': 'cup ' + 'very ' * int(rng.integers(0, 9)) + str(n), 'category': 'Küche', 'brand': '', 'price': ''}
           for n in range(12)]
  items[3] = items[5]
  lengths = rng.integers(2, 9, 40)
  data = Histories('shop_of_cups', [f'u{n}' for n in range(40)], [f'i{n}' for n in range(12)], items,
                   np.cumsum([0, *lengths]), rng.integers(0, 12, lengths.sum()).astype(np.int32))
  texts = [TEMPLATE.item_text(item) for item in items]
  vocabulary = train_vocabulary([' ' + text for text in texts], size=300, phrases=template_phrases(TEMPLATE)[1:])
  folder = tmp_path_factory.mktemp('data')
  (folder / data.name).mkdir()
  histories_lib.write(folder / data.name, data, {})
  names, mixtures = set(seqio.TaskRegistry.names()), set(seqio.MixtureRegistry.names())
  registry.register(folder, vocabulary, names=[data.name], mixture='mixture_of_cups')
  corpus = build_corpus([Source(data, item_tokens(texts, vocabulary))], template=TEMPLATE, vocabulary=vocabulary,
                        split='train', max_item_tokens=64)
  yield data.name, vocabulary, corpus
  for name in set(seqio.TaskRegistry.names()) - names:
    seqio.TaskRegistry.remove(name)
  for name in set(seqio.MixtureRegistry.names()) - mixtures:
    seqio.MixtureRegistry.remove(name)


def histories_of(batch):
  """How often each history is in a batch: its arrays, with its target alone, items counted from the first one kept."""
  found = collections.Counter()
  for row, span in zip(*np.nonzero(batch['span_texts']), strict=True):
    at = batch['segments'][row] == batch['span_segments'][row, span]
    slot_row, slot = divmod(int(batch['span_slots'][row, span]), batch['slot_texts'].shape[1])
    assert batch['slot_texts'][slot_row, slot] == batch['span_texts'][row, span]
    alone = batch['alone_segments'][slot_row] == slot + 1
    items = batch['items'][row, at]
    before = items[items > 0][0] - 1
    arrays = [batch[name][row, at] for name in ('tokens', 'labels', 'positions', 'loss_weights')] + [
        batch['alone_tokens'][slot_row, alone], batch['alone_positions'][slot_row, alone],
        np.where(items > 0, items - before, 0)]
    found[tuple(tuple(array.tolist()) for array in arrays) + (int(batch['span_items'][row, span] - before),)] += 1
  return found


def check_same_histories(batches, corpus, length):
  one_pass = OnePass(corpus, batch_size=3, length=length, options=RowOptions(targets='last'))
  expected = sum((histories_of(one_pass.batch(step)) for step in range(len(one_pass))), collections.Counter())
  actual = sum((histories_of(batch) for batch in batches), collections.Counter())
  assert actual == expected and expected.total() == len(one_pass.excerpts)
  return one_pass


def converted(name, converter, inputs, targets=64):
  """Batches of four rows, their slots counted over the batch."""
  examples = seqio.get_mixture_or_task(name).get_dataset(None, split='train', shuffle=False)
  batches = converter(examples, {'inputs': inputs, 'targets': targets}).batch(4).as_numpy_iterator()
  return [batch | {'span_slots': batch_slots(batch['span_slots'], batch['slot_texts'].shape[1])} for batch in batches]


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('inputs', [400, 56])
def test_a_tasks_rows_hold_the_histories_of_its_split(shop, pack, inputs):
  name, vocabulary, corpus = shop
  converter = CalRecFeatureConverter(vocabulary, pack=pack, apply_length_check=False)
  one_pass = check_same_histories(converted(name, converter, inputs), corpus, inputs + 64)
  cut = one_pass.excerpts.cut
  assert (cut['histories_cut'] > 0) == (inputs == 56)
  assert {key: converter.report[key] for key in ('histories', 'histories_cut', 'context_items_cut')} == {
      'histories': len(one_pass.excerpts), **{key: cut[key] for key in ('histories_cut', 'context_items_cut')}}


def test_packed_rows_are_fewer_and_full(shop):
  name, vocabulary, _ = shop
  rows = {pack: np.concatenate([batch['segments'] for batch in converted(
      name, CalRecFeatureConverter(vocabulary, pack=pack, apply_length_check=False), 400)]) for pack in (True, False)}
  assert len(rows[True]) < len(rows[False]) / 2 and (rows[True] > 0).mean() > 0.8


def test_packed_rows_do_not_come_sorted_by_length(shop):
  name, vocabulary, _ = shop
  rows = [batch['segments'] > 0 for batch in converted(
      name, CalRecFeatureConverter(vocabulary, spans_per_row=1, apply_length_check=False), 400)]
  tokens = np.concatenate(rows).sum(axis=1)
  falls = np.mean(np.diff(tokens) < 0)
  assert 0.2 < falls < 0.8 and sorted(tokens, reverse=True) != tokens.tolist()


def test_items_that_are_not_told_apart_fail(shop, monkeypatch):
  name, vocabulary, corpus = shop
  whole = feature_converters.item_runs
  monkeypatch.setattr(feature_converters, 'item_runs', lambda *args: [(whole(*args)[0][0], whole(*args)[-1][1])])
  converter = CalRecFeatureConverter(vocabulary, apply_length_check=False)
  with pytest.raises(AssertionError):
    check_same_histories(converted(name, converter, 400, targets=300), corpus, 700)


def test_slots_of_the_row_taken_for_slots_of_the_batch_fail(shop, monkeypatch):
  name, vocabulary, corpus = shop
  monkeypatch.setitem(globals(), 'batch_slots', lambda slots, slots_per_row: slots)
  with pytest.raises(AssertionError):
    converter = CalRecFeatureConverter(vocabulary, apply_length_check=False)
    check_same_histories(converted(name, converter, 400), corpus, 464)


def test_seqio_reads_a_task_through_the_converter(shop):
  name, vocabulary, corpus = shop
  converter = CalRecFeatureConverter(vocabulary)
  rows = list(seqio.get_dataset(name, {'inputs': 150, 'targets': 64}, dataset_split='train', shuffle=True, seed=1,
                                feature_converter=converter).as_numpy_iterator())
  assert sum((row['span_texts'] > 0).sum() for row in rows) == (np.diff(corpus.offsets) >= 2).sum()
  assert all(row['tokens'].shape == (214,) for row in rows)
