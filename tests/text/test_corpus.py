"""The corpus and its excerpts: each item after the first a target once, every excerpt fits, as a plain loop has it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_corpus import toy_corpus, toy_source, toy_vocabulary

from calrec_jax.errors import UserError
from calrec_jax.text.corpus import Excerpts, build_corpus, excerpts
from calrec_jax.text.templates import ItemTemplate

LONGEST = 4
lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=6)  # tokens of the items
histories = st.lists(st.lists(st.integers(0, 5), max_size=14), min_size=1, max_size=6)
prompts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())  # tokens of FIRST and NEXT, whether a BOS


@st.composite
def corpora(draw):
  """(corpus, L): the items of a corpus are capped at a number of tokens that lets two of them fit L."""
  items = [[10 + n] * length for n, length in enumerate(draw(lengths))]
  first, following, bos = draw(prompts)
  corpus = toy_corpus(items, [[event % len(items) for event in history] for history in draw(histories)],
                      first=[2] * first, following=[3] * following, bos=4 if bos else None,
                      max_item_tokens=draw(st.integers(1, LONGEST)))
  least = corpus.opener[1] + corpus.next_prompt[1] + 2 * int(corpus.item_lengths.max())
  return corpus, draw(st.integers(least, least + 15))


def tokens_of(corpus, start, stop):
  """Tokens of the excerpt [start, stop), by a plain sum."""
  texts = sum(int(corpus.item_lengths[corpus.events[e]]) for e in range(start, stop))
  return texts + corpus.opener[1] + (stop - start - 1) * corpus.next_prompt[1]


def columns(cut):
  arrays = (cut.users, cut.starts, cut.stops, cut.first_targets)
  return list(zip(*(a.tolist() for a in arrays), strict=True))


def spans(corpus):
  """(user, first event, end) of each history that has a target."""
  ends = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
  return [(user, low, high) for user, (low, high) in enumerate(ends) if high - low >= 2]


def check_last(corpus, L, cut):
  expected = []
  for user, low, high in spans(corpus):
    start = low
    while tokens_of(corpus, start, high) > L:
      start += 1
    expected.append((user, start, high, high - 1))
  assert columns(cut) == expected
  assert cut.cut['context_items_cut'] == sum(start - corpus.offsets[user] for user, start, *_ in expected)
  assert cut.cut['histories_without_target'] == len(corpus.offsets) - 1 - len(expected)


def check_windows(corpus, L, context_items, cut):
  """The laws of the windows, and the windows themselves, against a plain loop."""
  targets = [event for _, _, stop, first in columns(cut) for event in range(first, stop)]
  assert targets == [event for _, low, high in spans(corpus) for event in range(low + 1, high)]
  expected = []
  for user, low, high in spans(corpus):
    start, first = low, low + 1
    while first < high:
      stop = first + 1
      while stop < high and tokens_of(corpus, start, stop + 1) <= L:
        stop += 1
      expected.append((user, start, stop, first))
      first = stop
      start = max(low, first - max(context_items, 1))
      while first < high and tokens_of(corpus, start, first + 1) > L:
        start += 1
  assert columns(cut) == expected


def check_sizes(corpus, L, cut):
  for number, (_, start, stop, first) in enumerate(columns(cut)):
    assert start < first < stop
    assert cut.tokens[number] == tokens_of(corpus, start, stop) <= L
    assert cut.losses[number] == sum(corpus.item_lengths[corpus.events[e]] + 1 for e in range(first, stop))


@given(corpora())
@settings(deadline=None)
def test_last_keeps_the_newest_whole_items(problem):
  corpus, L = problem
  cut = excerpts(corpus, length=L, targets='last', context_items=3)
  check_last(corpus, L, cut)
  check_sizes(corpus, L, cut)


@given(corpora(), st.integers(0, 5))
@settings(deadline=None)
def test_windows_make_each_item_after_the_first_a_target_once(problem, context_items):
  corpus, L = problem
  cut = excerpts(corpus, length=L, targets='all', context_items=context_items)
  check_windows(corpus, L, context_items, cut)
  check_sizes(corpus, L, cut)
  assert cut.cut['windows'] == len(cut)
  assert cut.cut['histories_cut'] == sum(tokens_of(corpus, low, high) > L for _, low, high in spans(corpus))


def _long() -> tuple:
  corpus = toy_corpus([[7, 8], [9, 9]], [[0, 1] * 6, [1]])
  return corpus, 12, excerpts(corpus, length=12, targets='all', context_items=2)


def _shift(cut: Excerpts, **by: int) -> Excerpts:
  """A mutant: the second window's columns moved by so much."""
  moved = {name: getattr(cut, name) + np.eye(len(cut), dtype=np.int64)[1] * step for name, step in by.items()}
  return dataclasses.replace(cut, **moved)


@pytest.mark.parametrize('mutant', [{'first_targets': -1}, {'first_targets': 1}, {'starts': 1}, {'starts': -1},
                                    {'stops': 1}])
def test_mutants_of_the_windows_fail(mutant):
  corpus, L, cut = _long()
  check_windows(corpus, L, 2, cut)
  with pytest.raises(AssertionError):
    check_windows(corpus, L, 2, _shift(cut, **mutant))


def test_windows_by_example():
  # Each item takes 3 tokens with its prompt: four a window. Two older ones open it, so each brings two new targets.
  _, _, cut = _long()
  assert columns(cut) == [(0, 0, 4, 1), (0, 2, 6, 4), (0, 4, 8, 6), (0, 6, 10, 8), (0, 8, 12, 10)]
  assert cut.cut == {'histories': 2, 'histories_without_target': 1, 'histories_cut': 1, 'windows': 5}


def test_a_mutant_of_last_fails():
  corpus, L, _ = _long()
  cut = excerpts(corpus, length=L, targets='last', context_items=2)
  check_last(corpus, L, cut)
  with pytest.raises(AssertionError):
    check_last(corpus, L, dataclasses.replace(cut, starts=cut.starts + 1))


def test_a_row_too_short_for_two_items_names_the_cure():
  corpus = toy_corpus([[7] * 5, [8]], [[0, 1]])
  assert len(excerpts(corpus, length=12, targets='last', context_items=0)) == 1
  with pytest.raises(UserError, match="TASK_FEATURE_LENGTHS: a row of 11 tokens .* give .* 12 together"):
    excerpts(corpus, length=11, targets='last', context_items=0)


@pytest.mark.parametrize('targets', ['last', 'all'])
def test_no_history_has_a_target(targets):
  corpus = toy_corpus([[7]], [[0], []])
  cut = excerpts(corpus, length=8, targets=targets, context_items=0)
  assert len(cut) == 0 and cut.cut['histories_without_target'] == 2


def test_splits_hide_the_newest_events():
  items, histories = [[7], [8], [9]], [[0, 1, 2, 0, 1], [2, 1], [0]]
  seen = {split: toy_corpus(items, histories, split=split) for split in ('train', 'validation', 'test')}
  assert {split: (c.events.tolist(), c.offsets.tolist()) for split, c in seen.items()} == {
      'train': ([0, 1, 2], [0, 3, 3, 3]), 'validation': ([0, 1, 2, 0, 2], [0, 4, 5, 5]),
      'test': ([0, 1, 2, 0, 1, 2, 1, 0], [0, 5, 7, 8])}


def test_sources_share_texts_and_number_items_apart():
  sources = [toy_source([[7, 8], [9]], [[0, 1]], name='a'),
             toy_source([[9], [5], [7, 8]], [[2, 1], [0, 0]], name='b', rate=2)]
  corpus = build_corpus(sources, template=ItemTemplate(), vocabulary=toy_vocabulary(bos=4), split='test',
                        max_item_tokens=9)
  assert corpus.events.tolist() == [0, 1, 4, 3, 2, 2]
  assert corpus.text_ids.tolist() == [1, 2, 2, 3, 1]
  assert corpus.user_ids == ['a0', 'b0', 'b1'] and corpus.user_sources.tolist() == [0, 1, 1]
  assert corpus.rates.tolist() == [1, 2]
  item = lambda n: corpus.bank[corpus.item_starts[n]:][:corpus.item_lengths[n]].tolist()
  assert [item(n) for n in range(5)] == [[7, 8], [9], [9], [5], [7, 8]]
  assert [item(n) for n in corpus.text_items[1:]] == [[7, 8], [9], [5]]
  start, length = corpus.opener
  assert corpus.bank[start:start + length].tolist() == [4, 2] and corpus.bos_length == 1
  assert corpus.bank[corpus.next_prompt[0]] == 3 and corpus.next_prompt[1] == 1


def test_shares_of_texts_among_the_targets_that_are_drawn():
  sources = [toy_source([[7, 8], [9]], [[0, 1, 1], [0]], name='a'),
             toy_source([[9], [5], [7, 8]], [[2, 1], [1, 0, 0, 2]], name='b', rate=2)]
  corpus = build_corpus(sources, template=ItemTemplate(), vocabulary=toy_vocabulary(), split='test', max_item_tokens=9)
  cut = excerpts(corpus, length=40, targets='all', context_items=0)
  # Source a gives one history with two targets, b twice as often one of two, with one and three.
  weights = {'[9]': 2 * 1 + 2 * 2 / 2, '[5]': 2 * 1 / 2, '[7, 8]': 2 * 1 / 2}
  shares = np.array([weights['[7, 8]'], weights['[9]'], weights['[5]']]) / sum(weights.values())
  np.testing.assert_allclose(cut.log_shares, [0, *np.log(shares)], rtol=1e-6)
  last = excerpts(corpus, length=40, targets='last', context_items=0)
  np.testing.assert_allclose(last.log_shares, [0, *np.log([1 / 3, 1 / 3, 1 / 3])], rtol=1e-6)


def test_long_items_are_cut_and_counted():
  corpus = toy_corpus([[5, 6, 7, 8], [9], [5, 6, 7]], [[0, 1]], max_item_tokens=2)
  assert corpus.item_lengths.tolist() == [2, 1, 2]
  assert corpus.cut == {'items_cut': 2, 'item_tokens_cut': 3}
