"""What is counted of tokens: a plain loop's numbers, and those that training and inference report of the same data."""

import types

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from random_histories import rows
from refusals import refused
from toy_corpus import toy_source

from calrec_jax.data.histories import load
from calrec_jax.description import tokens
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.text.item_tokens import item_tokens
from calrec_jax.text.rows import build_rows
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary

TITLE = ItemTemplate(fields=('title',))  # 'Title: a b.' is a token more than its title
LONGEST = 6


def words(bos: int | None) -> types.SimpleNamespace:
  """A vocabulary whose tokens are words; a prompt is one, too."""
  encode = lambda text: [7] if text in (FIRST, NEXT) else list(range(len(text.split())))
  return types.SimpleNamespace(encode=encode, encode_batch=lambda texts: list(map(encode, texts)), bos_id=bos, eos_id=1,
                               fingerprint='words', vocab_size=8)


@st.composite
def problems(draw):
  """(data set, tokens of each item, length, item_length, tokens before the first item)."""
  n_words = draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=5))
  histories = draw(st.lists(st.lists(st.integers(0, len(n_words) - 1), max_size=9), min_size=1, max_size=5))
  data = toy_source([[number] for number in n_words], histories).histories
  for item, n in zip(data.items, n_words, strict=True):
    item['title'] = ' '.join('a' * n)
  item_length, bos = draw(st.integers(2, LONGEST + 3)), draw(st.sampled_from([None, 5]))
  least = 2 + (bos is not None) + 2 * item_length
  return data, [n + 1 for n in n_words], draw(st.integers(least, least + 20)), item_length, bos


@given(problems())
def test_what_is_cut_is_what_a_plain_loop_cuts(problem):
  data, n_tokens, length, item_length, bos = problem
  found = tokens.lengths(data, words(bos), template=TITLE, length=length, item_length=item_length)
  size = lambda history: (bos is not None) + sum(min(n_tokens[item], item_length) + 1 for item in history)
  assert found['items']['cut']['count'] == sum(n > item_length for n in n_tokens)
  assert found['items']['quantiles']['max'] == max(n_tokens)
  wholes = [size(history) for history in rows(data) if len(history) > 1]
  assert sum(each['count'] for each in found['histories']['histogram']) == len(wholes)
  assert found['histories']['quantiles'].get('max') == max(wholes, default=None)
  trains = [history[:-2] for history in rows(data)]
  kept = lambda history, room, extra: next(n for n in range(len(history), -1, -1)
                                           if size(history[len(history) - n:]) + extra <= room)
  asked = [each['length'] for each in found['training']]
  assert length in asked
  for each in found['training']:
    lost = [len(history) - kept(history, each['length'], 0) for history in trains if len(history) > 1]
    assert (each['histories'], each['cut']['count'], each['lost']['count']) == (
        len(lost), sum(n > 0 for n in lost), sum(lost))
    assert each['events'] == sum(map(len, trains)) and each['windows'] >= each['histories'] + each['cut']['count']
    assert each['lost']['share'] == (sum(lost) / each['events'] if each['events'] else 0)
  contexts = [history[:-1] for history in rows(data) if len(history) > 1]
  lost = [len(history) - kept(history, length - item_length, 1) for history in contexts]
  assert (found['inference']['histories'], found['inference']['cut']['count'], found['inference']['lost']['count']) == (
      len(contexts), sum(n > 0 for n in lost), sum(lost))
  assert found['inference']['events'] == sum(map(len, contexts))


def test_what_is_cut_is_what_training_reports_and_reads(tiny_store):
  inputs = tiny.inputs(tiny_store, 'books', task_feature_lengths={'inputs': 28, 'targets': 8})
  found = tokens.lengths(load(tiny_store / 'data/books'), load_vocabulary(tiny_store / 'vocabulary.json'),
                         template=inputs.template, length=inputs.length, item_length=inputs.max_item_tokens)
  corpus = inputs.corpus(inputs.load(), 'train')
  last, windows = (BatchPlan(corpus, batch_size=8, length=inputs.length, seed=0,
                             options=RowOptions(targets=targets, window_steps=4)) for targets in ('last', 'all'))
  [told] = [each for each in found['training'] if each['length'] == inputs.length]
  assert 0 < told['cut']['count'] == last.report['histories_cut'] == windows.report['histories_cut']
  assert 0 < told['lost']['count'] == last.report['context_items_cut'] and told['windows'] == windows.report['windows']
  assert found['items']['cut']['count'] == last.report['items_cut'] > 0
  read = 0  # items of all histories, in rows that a step could read
  for number in range(len(last.excerpts)):
    layout = types.SimpleNamespace(rows=[np.array([number])], alone_rows=[np.array([corpus.text_ids[
        corpus.events[last.excerpts.stops[number] - 1]]])])
    read += len(set(build_rows(corpus, last.excerpts, layout, last.shapes)['items'].ravel().tolist()) - {0})
  assert read == told['events'] - told['lost']['count'] - last.report['histories_without_target']


def test_tokens_of_an_item_are_those_of_the_table(tiny_store):
  data, vocabulary = load(tiny_store / 'data/games'), load_vocabulary(tiny_store / 'vocabulary.json')
  found = tokens.lengths(data, vocabulary, template=ItemTemplate(), length=512, item_length=64)
  lengths_I = np.diff(item_tokens([ItemTemplate().item_text(item) for item in data.items], vocabulary).offsets)
  assert found['items']['quantiles']['mean'] == pytest.approx(lengths_I.mean())
  assert found['vocabulary'] == {'fingerprint': vocabulary.fingerprint, 'size': vocabulary.vocab_size}
  assert found['inference']['lost']['count'] == 0 and found['items']['cut']['count'] == 0


def test_a_length_that_holds_no_two_items_is_refused(tiny_store):
  data, vocabulary = load(tiny_store / 'data/games'), load_vocabulary(tiny_store / 'vocabulary.json')
  for length, item_length in ((12, 10), (40, 64), (10, 10)):
    refused(lambda length=length, item_length=item_length: tokens.lengths(
        data, vocabulary, template=ItemTemplate(), length=length, item_length=item_length),
            f'--length {length} ', f'--item_length {item_length} ', 'prompts')
