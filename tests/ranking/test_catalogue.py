"""Items with one text share a number, in catalogue order."""

import types

import pytest

from calrec_jax.ranking import catalogue
from calrec_jax.ranking.catalogue import Catalogue
from calrec_jax.text.templates import ItemTemplate


def test_items_with_one_text_are_found():
  store = Catalogue(list('abcde'), ['glue', 'tape', 'glue', 'hose', 'glue'])
  assert len(store) == 5
  assert store.text_ids_I.tolist() == [0, 1, 0, 2, 0]
  assert store.twins_I.tolist() == [2, 0, 2, 0, 2]


def test_the_catalogue_of_a_data_set_is_written_by_the_template():
  item = {'title': 'Glue', 'category': 'Tapes', 'brand': '', 'price': '$5'}
  histories = types.SimpleNamespace(item_ids=['a', 'b'], items=[item, {**item, 'brand': 'Gorilla'}])
  full = catalogue.from_histories(histories, ItemTemplate())
  assert full.texts == ['Title: Glue. Category: Tapes. Brand: Unknown. Price: $5.',
                        'Title: Glue. Category: Tapes. Brand: Gorilla. Price: $5.']
  assert full.twins_I.tolist() == [0, 0]
  titles = catalogue.from_histories(histories, ItemTemplate(fields=('title',)))
  assert titles.twins_I.tolist() == [1, 1]


def test_an_empty_catalogue_and_one_that_does_not_fit():
  assert Catalogue([], []).twins_I.tolist() == []
  with pytest.raises(ValueError, match='2 item ids'):
    Catalogue(['a', 'b'], ['glue'])
