"""Rows: the numbers of the module's docstring, to the letter, and again with a BOS."""

import re

import numpy as np
import pytest
from toy_corpus import random_corpus, toy_corpus

from calrec_jax.text import rows as rows_lib
from calrec_jax.text.corpus import excerpts
from calrec_jax.text.rows import BatchLayout, Shapes, build_rows, target_texts

FILLER = [[90 + n] for n in range(30)]  # so that the texts of the example are numbers 31 to 33
ITEMS = [*FILLER, [7, 8], [9], [5, 6]]
HISTORIES = [[30, 31, 30], [32, 31]]
LAYOUT = BatchLayout([np.array([0, 1])], [np.array([31, 32])])


def documented() -> dict[str, list[float]]:
  """Name to numbers of each array in the docstring."""
  found = re.findall(r'(\w+) +\[([-.\d ]+)\]', rows_lib.__doc__.split('\n\n')[2])
  return {name: [float(n) for n in numbers.split()] for name, numbers in found}


def check(batch, expected):
  for name, numbers in expected.items():
    assert np.round(batch[name][0].astype(float), 3).tolist() == numbers, name


def example(bos=None, L=16, M=4):
  corpus = toy_corpus(ITEMS, HISTORIES, bos=bos)
  cut = excerpts(corpus, length=L, targets='all', context_items=0)
  return build_rows(corpus, cut, LAYOUT, Shapes(B=1, L=L, M=M, E=3, S=2))


def test_the_numbers_of_the_docstring():
  expected = documented()
  shapes = Shapes(B=1, L=16, M=4, E=3, S=2).features()
  assert set(expected) == set(shapes)
  assert {n: (1, len(numbers)) for n, numbers in expected.items()} == {n: shape for n, (shape, _) in shapes.items()}
  check(example(), expected)


def test_the_numbers_with_a_bos():
  check(example(bos=4, L=17, M=6), {
      'tokens':       [4, 2, 7, 8, 3, 9, 3, 7, 8, 4, 2, 5, 6, 3, 9, 0, 0],
      'labels':       [2, 7, 8, 1, 9, 1, 7, 8, 1, 2, 5, 6, 1, 9, 1, 0, 0],
      'segments':     [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0],
      'positions':    [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 0, 0],
      'items':        [0, 0, 1, 1, 0, 2, 0, 3, 3, 0, 0, 1, 1, 0, 2, 0, 0],
      'loss_weights': [0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0],
      'alone_tokens': [4, 7, 8, 4, 9, 0], 'alone_segments': [1, 1, 1, 2, 2, 0], 'alone_positions': [0, 1, 2, 0, 1, 0],
      'slot_texts': [31, 32],
      'span_segments': [1, 1, 2], 'span_items': [2, 3, 2], 'span_slots': [1, 0, 1], 'span_texts': [32, 31, 32],
      'span_log_shares': [-0.405, -1.099, -0.405]})


@pytest.mark.parametrize('mutant', ['labels', 'positions', 'span_slots', 'loss_weights'])
def test_a_wrong_number_is_seen(mutant):
  batch = example()
  batch[mutant][0, 2] += 1
  with pytest.raises(AssertionError):
    check(batch, documented())


def test_dtypes_are_as_declared():
  batch = example()
  assert {name: (a.shape, a.dtype.type) for name, a in batch.items()} == Shapes(1, 16, 4, 3, 2).features()


def test_prompts_of_several_tokens():
  corpus = toy_corpus([[7, 8], [9]], [[0, 1]], first=[2, 20], following=[3, 30])
  cut = excerpts(corpus, length=8, targets='last', context_items=0)
  batch = build_rows(corpus, cut, BatchLayout([np.array([0])], [np.array([2])]), Shapes(1, 8, 2, 1, 1))
  check(batch, {'tokens':       [2, 20, 7, 8, 3, 30, 9, 0],
                'labels':       [20, 7, 8, 1, 30, 9, 1, 0],
                'items':        [0, 0, 1, 1, 0, 0, 2, 0],
                'loss_weights': [0, 0, 0, 0, 0, 1, 1, 0]})


def test_slots_are_counted_over_all_rows_and_any_rows_can_be_built_apart():
  corpus = random_corpus(0, users=12)
  cut = excerpts(corpus, length=64, targets='all', context_items=2)
  chosen = np.arange(len(cut))
  texts = np.unique(target_texts(corpus, cut, chosen))
  layout = BatchLayout([chosen[i::6] for i in range(5)] + [chosen[5::6], chosen[:0]],
                       [texts[:3], texts[3:3], *np.array_split(texts[3:], 5)])
  shapes = Shapes(B=7, L=128, M=64, E=24, S=8)
  whole = build_rows(corpus, cut, layout, shapes)
  used = whole['span_texts'] > 0
  np.testing.assert_array_equal(whole['slot_texts'].reshape(-1)[whole['span_slots']][used], whole['span_texts'][used])
  assert used.sum() == (cut.stops - cut.first_targets).sum()
  for rows in (slice(0, 2), slice(2, 7), slice(6, 7), slice(1, 2)):
    for name, array in build_rows(corpus, cut, layout, shapes, rows).items():
      np.testing.assert_array_equal(array, whole[name][rows], err_msg=name)


def test_items_of_a_cut_history_keep_their_numbers():
  corpus = toy_corpus([[7, 8], [9, 9]], [[0, 1, 0, 1]])
  cut = excerpts(corpus, length=6, targets='last', context_items=0)
  batch = build_rows(corpus, cut, BatchLayout([np.array([0])], [np.array([2])]), Shapes(1, 6, 2, 1, 1))
  check(batch, {'tokens': [2, 7, 8, 3, 9, 9], 'items': [0, 3, 3, 0, 4, 4], 'span_items': [4]})


def test_an_empty_batch():
  corpus = toy_corpus([[7], [8]], [[0, 1]])
  cut = excerpts(corpus, length=8, targets='last', context_items=0)
  nothing = np.zeros(0, np.int64)
  batch = build_rows(corpus, cut, BatchLayout([nothing] * 2, [nothing] * 2), Shapes(2, 8, 4, 1, 1))
  assert not any(array.any() for array in batch.values())
