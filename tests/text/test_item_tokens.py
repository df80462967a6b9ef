"""The pieces' tokens are a history's tokens; the table is computed once and never stale."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.data.histories import Histories
from calrec_jax.text import item_tokens as item_tokens_lib
from calrec_jax.text.item_tokens import (
    count_cut_differences,
    item_tokens,
    load_item_tokens,
    prompt_tokens,
    user_tokens,
)
from calrec_jax.text.templates import FIELDS, FIRST, NEXT, ItemTemplate, text_pair
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

TEMPLATE = ItemTemplate()
ITEMS = [{'title': f'{size} cup {n}', 'category': 'Kitchen', 'brand': '', 'price': '$5.99'}
         for n in range(3) for size in ('small', 'größer')]
TEXTS = [TEMPLATE.item_text(item) for item in ITEMS]
VOCABULARY = train_vocabulary([' ' + text for text in TEXTS], size=330, phrases=template_phrases(TEMPLATE))
BARE = train_vocabulary([' ' + text for text in TEXTS], size=330, phrases=[])  # prompts are cut into words
HISTORIES = Histories('cups', ['u'], list('abcdef'), ITEMS, np.array([0, 6]), np.arange(6, dtype=np.int32), None)

values = st.text(st.characters(exclude_categories=['Cs']), max_size=12)
items = st.fixed_dictionaries({field: values for field in FIELDS})


def test_a_table_holds_each_piece():
  table = item_tokens(TEXTS, VOCABULARY)
  assert (table.tokens.dtype, table.offsets.dtype) == (np.int32, np.int64)
  for index, text in enumerate(TEXTS):
    np.testing.assert_array_equal(table.item(index), VOCABULARY.encode(' ' + text))


def test_batches_do_not_show(monkeypatch):
  whole = item_tokens(TEXTS, VOCABULARY)
  monkeypatch.setattr(item_tokens_lib, '_BATCH', 4)
  for a, b in zip(dataclasses.astuple(whole), dataclasses.astuple(item_tokens(TEXTS, VOCABULARY)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_no_items():
  table = item_tokens([], VOCABULARY)
  assert table.tokens.shape == (0,) and table.offsets.tolist() == [0]


def test_prompts():
  prompts = prompt_tokens(BARE)
  assert BARE.decode(prompts.first) == FIRST and BARE.decode(prompts.next) == NEXT
  assert prompts.first.dtype == prompts.next.dtype == np.int32
  assert len(prompt_tokens(VOCABULARY).first) == len(prompt_tokens(VOCABULARY).next) == 1


@pytest.mark.parametrize('vocabulary', [VOCABULARY, BARE])
@given(history=st.lists(items, min_size=2, max_size=4))
def test_the_pieces_join_to_the_text_and_to_the_tokens_of_the_whole(vocabulary, history):
  texts = [TEMPLATE.item_text(item) for item in history]
  table = item_tokens(texts, vocabulary)
  *context, target = [table.item(i) for i in range(len(texts))]
  user = user_tokens(context, prompt_tokens(vocabulary))
  inputs, targets = text_pair(texts)
  assert vocabulary.decode(user) == inputs
  assert vocabulary.decode(target) == targets
  # No merge of byte-level BPE crosses a cut: a piece ends in '.', and the next one begins with white space.
  assert user.tolist() + target.tolist() == vocabulary.encode(inputs + targets)


def test_pieces_cut_before_the_space_would_not_be_the_whole_text():
  # The mutant: the space at the end of the prompt. ' Title:' is one token, ' ' and 'Title:' are not.
  texts = ['small cup.', 'small cup.']
  prompts = prompt_tokens(BARE)
  mutant = [*BARE.encode(FIRST + ' '), *BARE.encode(texts[0]), *prompts.next.tolist()]
  assert BARE.decode(mutant) == text_pair(texts)[0]
  assert mutant != BARE.encode(text_pair(texts)[0])


def test_cut_differences_are_counted():
  assert count_cut_differences(TEXTS, VOCABULARY) == 0
  assert count_cut_differences(TEXTS, BARE) == 0

  class Merging:  # merges a full stop and the line break after it, as some pretrained tokenizers do
    def encode(self, text):
      return [ord(c) for c in text.replace('.\n', '\0')]

    def encode_batch(self, texts):
      return [self.encode(text) for text in texts]

  assert count_cut_differences(TEXTS, Merging()) == len(TEXTS)


def _files(folder):
  return sorted((folder / 'item_tokens').glob('*'))


def _fail(*_):
  raise AssertionError('computed a second time')


def test_the_table_is_kept(tmp_path, monkeypatch):
  first = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  assert [path.suffix for path in _files(tmp_path)] == ['.npz']
  monkeypatch.setattr(item_tokens_lib, 'item_tokens', _fail)
  again = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  np.testing.assert_array_equal(again.tokens, first.tokens)
  np.testing.assert_array_equal(again.offsets, first.offsets)
  assert (again.tokens.dtype, again.offsets.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize('change', ['data', 'template', 'vocabulary'])
def test_another_input_gives_another_table(tmp_path, change):
  load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  changed = [dict(ITEMS[0], title='plate'), *ITEMS[1:]]
  histories = dataclasses.replace(HISTORIES, items=changed) if change == 'data' else HISTORIES
  template = ItemTemplate(fields=('title',)) if change == 'template' else TEMPLATE
  vocabulary = BARE if change == 'vocabulary' else VOCABULARY
  table = load_item_tokens(tmp_path, histories, template, vocabulary)
  assert vocabulary.decode(table.item(0)) == ' ' + template.item_text(histories.items[0])
  assert len(_files(tmp_path)) == 2


@pytest.mark.parametrize('damage', [lambda data: b'', lambda data: data[:40], lambda data: data[:-30],
                                    lambda data: data[:60] + bytes(40) + data[100:]])
def test_a_damaged_file_is_computed_anew(tmp_path, damage):
  first = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  [path] = _files(tmp_path)
  good = path.read_bytes()
  path.write_bytes(damage(good))
  again = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  np.testing.assert_array_equal(again.tokens, first.tokens)
  assert len(path.read_bytes()) == len(good)


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
  (tmp_path / 'item_tokens').write_text('a file in the way')
  table = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  assert len(table.offsets) == len(ITEMS) + 1
