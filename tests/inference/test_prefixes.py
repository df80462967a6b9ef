"""Prefixes are the user part of the training rows; batches hold each user once."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.inference.prefixes import Prefixes, form_batches, make_prefixes
from calrec_jax.text.corpus import Source, build_corpus, excerpts
from calrec_jax.text.item_tokens import ItemTokens, PromptTokens, item_tokens
from calrec_jax.text.rows import BatchLayout, Shapes, build_rows
from calrec_jax.text.templates import ItemTemplate, text_pair
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

TEMPLATE = ItemTemplate(fields=('title', 'brand'))
TITLES = {'Strong Glue': 'Acme', 'Hose': '', 'A very long garden hose': 'Acme', 'Tape': 'Bolt'}
ITEMS = [{'title': title, 'category': '', 'brand': brand, 'price': ''} for title, brand in TITLES.items()]
TEXTS = [TEMPLATE.item_text(item) for item in ITEMS]
VOCABULARY = train_vocabulary(TEXTS, size=300, phrases=template_phrases(TEMPLATE))
TABLE = item_tokens(TEXTS, VOCABULARY)

# Items [7 8], [5] and [4 4 4]; FIRST is [2], NEXT is [3], BOS is 9.
SMALL = ItemTokens(np.array([7, 8, 5, 4, 4, 4], np.int32), np.array([0, 2, 3, 6]))
PROMPTS = PromptTokens(np.array([2], np.int32), np.array([3], np.int32))


def small(bos=(9,), max_item_tokens=64, max_length=64):
  return Prefixes(np.array(bos, np.int32), PROMPTS, SMALL, max_item_tokens, max_length)


def test_the_numbers_of_the_docstring():
  assert small().tokens(np.array([0, 1])).tolist() == [9, 2, 7, 8, 3, 5, 3]
  assert small(bos=()).tokens(np.array([0, 1])).tolist() == [2, 7, 8, 3, 5, 3]
  assert small(max_item_tokens=2).tokens(np.array([2])).tolist() == [9, 2, 4, 4, 3]


@pytest.mark.parametrize('max_length, kept', [(11, [0, 1, 2]), (10, [1, 2]), (8, [1, 2]), (7, [2]), (6, [2])])
def test_a_long_history_keeps_its_newest_whole_items(max_length, kept):
  items, length = small(max_length=max_length).newest(np.array([0, 1, 2]))
  assert items.tolist() == kept
  assert length == len(small().tokens(items)) <= max_length


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(6, 30), st.integers(1, 4))
def test_what_is_kept_is_the_most_that_fits(items, max_length, cap):
  prefixes = small(max_item_tokens=cap, max_length=max_length)
  kept, length = prefixes.newest(np.array(items))
  assert kept.tolist() == items[len(items) - len(kept):] and len(kept) >= 1
  assert length == len(prefixes.tokens(kept)) <= max_length
  assert len(kept) == len(items) or len(prefixes.tokens(np.array(items[-len(kept) - 1:]))) > max_length


def test_a_prefix_reads_as_the_user_part_of_the_text_pair():
  prefixes = make_prefixes(VOCABULARY, TABLE, max_item_tokens=64, max_length=400)
  inputs, _ = text_pair([TEXTS[2], TEXTS[1], TEXTS[0]])
  assert VOCABULARY.decode(prefixes.tokens(np.array([2, 1])).tolist()) == inputs


@pytest.mark.parametrize('bos_id', [None, 299])
@pytest.mark.parametrize('max_item_tokens', [5, 64])
def test_a_prefix_is_what_training_reads_before_the_target(bos_id, max_item_tokens):
  vocabulary = types.SimpleNamespace(bos_id=bos_id, eos_id=1, encode=VOCABULARY.encode,
                                     encode_batch=VOCABULARY.encode_batch)
  events = np.array([0, 2, 1, 2, 3], np.int32)
  histories = Histories('shop', ['ann'], list('abcd'), ITEMS, np.array([0, 5]), events)
  corpus = build_corpus([Source(histories, TABLE)], template=TEMPLATE, vocabulary=vocabulary, split='test',
                        max_item_tokens=max_item_tokens)
  cut = excerpts(corpus, length=400, targets='last', context_items=0)
  layout = BatchLayout(rows=[np.array([0])], alone_rows=[corpus.text_ids[events[-1:]]])
  row = build_rows(corpus, cut, layout, Shapes(B=1, L=400, M=64, E=2, S=2))['tokens'][0]
  prefixes = make_prefixes(vocabulary, TABLE, max_item_tokens=max_item_tokens, max_length=400)
  prefix = prefixes.tokens(events[:-1])
  np.testing.assert_array_equal(row[:len(prefix)], prefix)
  assert row[len(prefix)] == TABLE.item(3)[0]


def test_a_prefix_that_cannot_hold_the_longest_item_is_refused():
  longest = int(np.diff(TABLE.offsets).max())
  with pytest.raises(UserError, match=f'max_prefix_length = 8: an item of {longest} tokens .* need {longest + 2}'):
    make_prefixes(VOCABULARY, TABLE, max_item_tokens=64, max_length=8)
  make_prefixes(VOCABULARY, TABLE, max_item_tokens=6, max_length=8)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 16))
def test_batches_hold_each_user_once_in_the_smallest_bucket(lengths, users_per_batch, bucket):
  batches = form_batches(np.array(lengths), users_per_batch=users_per_batch, bucket=bucket)
  assert sorted(user for users, _ in batches for user in users) == list(range(len(lengths)))
  for users, padded in batches:
    assert 1 <= len(users) <= users_per_batch and padded % bucket == 0 and users.tolist() == sorted(users)
    assert all(padded - bucket < lengths[user] <= padded for user in users)
  padded_lengths = [padded for _, padded in batches]
  assert padded_lengths == sorted(padded_lengths, reverse=True)
  assert sum(len(users) < users_per_batch for users, _ in batches) <= len(set(padded_lengths))
