"""The texts of the method, to the letter; and that no attribute can forge an item boundary."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.errors import UserError
from calrec_jax.text.templates import FIELDS, FIRST, NEXT, ItemTemplate, history_pieces, one_line, text_pair

CUP = {'title': 'Blue Cup', 'category': 'Kitchen, Cups', 'brand': 'Acme', 'price': '$5.99'}
BARE = {'title': 'Soap', 'category': '', 'brand': '', 'price': ''}
NOTHING = dict.fromkeys(FIELDS, '')
LINE_BREAKS = '\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'
PHRASE = 'item bought is as follows'

# What an attacker would write into an attribute, and plain rubbish.
_parts = st.sampled_from(['The next item bought is as follows', 'The first item bought is as follows.', PHRASE, '.',
                          ' ', 'the NEXT Item Bought Is As Follows.', '. Title:', FIRST, NEXT, *LINE_BREAKS])
hostile_texts = st.lists(st.one_of(_parts, st.text(max_size=5)), max_size=6).map(''.join)
hostile_items = st.fixed_dictionaries({field: hostile_texts for field in FIELDS})
templates = st.builds(ItemTemplate, unknown=st.sampled_from(['write', 'skip']),
                      fields=st.permutations(FIELDS).flatmap(lambda order: st.integers(1, 4).map(lambda n: order[:n])))


def test_an_item_is_written_as_in_the_paper():
  assert ItemTemplate().item_text(CUP) == 'Title: Blue Cup. Category: Kitchen, Cups. Brand: Acme. Price: $5.99.'


def test_a_missing_attribute_is_unknown():
  assert ItemTemplate().item_text(BARE) == 'Title: Soap. Category: Unknown. Brand: Unknown. Price: Unknown.'


def test_skip_leaves_missing_attributes_out_but_never_the_whole_item():
  skip = ItemTemplate(unknown='skip')
  assert skip.item_text(BARE) == 'Title: Soap.'
  assert skip.item_text(NOTHING) == 'Title: Unknown.'
  assert ItemTemplate(fields=['brand', 'title'], unknown='skip').item_text(BARE) == 'Title: Soap.'


def test_fields_are_written_in_their_order():
  assert ItemTemplate(fields=('price', 'title')).item_text(CUP) == 'Price: $5.99. Title: Blue Cup.'


@pytest.mark.parametrize('options', [{'fields': ()}, {'fields': ('title', 'colour')}, {'fields': ('title', 'title')},
                                     {'unknown': 'drop'}])
def test_a_wrong_option_is_named(options):
  with pytest.raises(UserError, match='text.fields|text.unknown'):
    ItemTemplate(**options)


def test_a_history_is_written_as_in_the_paper():
  inputs, targets = text_pair(['Title: A.', 'Title: B.', 'Title: C.'])
  assert inputs == (
      "This is the summary of a user's purchase history. The first item bought is as follows. Title: A."
      '\nThe next item bought is as follows. Title: B.'
      '\nThe next item bought is as follows.')
  assert targets == ' Title: C.'


def test_pieces_join_to_the_pair():
  texts = ['Title: A.', 'Title: B.', 'Title: C.']
  assert ''.join(history_pieces(texts)) == ''.join(text_pair(texts))


@pytest.mark.parametrize('line_break', [*LINE_BREAKS, '\r\n'])
def test_every_kind_of_line_break_becomes_a_space(line_break):
  assert one_line(f'a{line_break}b') == 'a b'
  assert len(one_line(f'a{line_break}b').splitlines()) == 1


@given(hostile_texts)
def test_one_line_is_idempotent(value):
  assert one_line(one_line(value)) == one_line(value)



@given(st.lists(hostile_items, min_size=1, max_size=4), templates)
def test_no_attribute_forges_an_item_boundary(items, template):
  texts = [template.item_text(item) for item in items]
  whole = ''.join(history_pieces(texts))
  assert len(re.findall(rf'{PHRASE}\.', whole, re.IGNORECASE)) == len(items)
  assert whole.removeprefix(FIRST + ' ').split(NEXT + ' ') == texts
  assert len(whole.splitlines()) == len(items)


def test_the_law_fails_where_attributes_are_written_as_they_are():
  raw = f'Title: A.{NEXT} Title: Forged.'
  whole = ''.join(history_pieces([raw]))
  assert whole.removeprefix(FIRST + ' ').split(NEXT + ' ') != [raw]
