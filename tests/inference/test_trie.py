"""The trie of a catalogue is the dictionary of its texts' beginnings, in arrays."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.inference.trie import Trie, build_trie
from calrec_jax.text.item_tokens import ItemTokens

EOS = 3
# Some tokens above 65,535, as a large vocabulary has; 0 is a token like any other.
TOKENS = st.sampled_from([0, 1, 2, 4, 5, 255, 256, 65_534, 65_535, 262_143])
ITEMS = st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=30)


def table(items) -> ItemTokens:
  return ItemTokens(np.asarray([token for item in items for token in item], np.int32),
                    np.cumsum([0, *map(len, items)], dtype=np.int64))


def build(items, max_item_tokens=64) -> Trie:
  return build_trie(table(items), max_item_tokens=max_item_tokens, eos_id=EOS)


def nodes(trie: Trie) -> list[tuple[int, ...]]:
  """The tokens that lead to each node, the end among them, by a walk along the edges."""
  found: list = [None] * len(trie.lows_N)
  found[0] = ()
  for node, tokens in enumerate(found):  # breadth first: a node's parent stands before it
    for edge in range(trie.starts_N1[node], trie.starts_N1[node + 1]):
      found[edge + 1] = (*tokens, int(trie.tokens_E[edge]))
  return found


def check(items, trie: Trie, max_item_tokens=64) -> None:
  """Holds a trie against a dictionary of beginnings."""
  items = [tuple(item[:max_item_tokens]) for item in items]
  texts = sorted(set(items))  # tuples sort as texts do: what begins another one stands before it
  below: dict[tuple, list[int]] = {}
  for number, text in enumerate(texts):
    for length in range(len(text) + 1):
      below.setdefault(text[:length], []).append(number)
    below[(*text, EOS)] = [number]
  depths = [[tokens for tokens in below if len(tokens) == depth] for depth in range(max(map(len, below)) + 1)]
  children = lambda node: sum(len(tokens) == len(node) + 1 and tokens[:-1] == node for tokens in below)
  assert trie.texts_I.tolist() == [texts.index(item) for item in items]
  assert trie.lengths_T.tolist() == list(map(len, texts)) and trie.n_texts == len(texts)
  assert sorted(nodes(trie)) == sorted(below)
  for tokens, low, high in zip(nodes(trie), trie.lows_N, trie.highs_N, strict=True):
    assert list(range(low, high)) == below[tokens]
  assert trie.nodes_D == tuple(map(len, depths)) and list(map(len, nodes(trie))) == sorted(map(len, below))
  assert trie.fanouts_D == tuple(max(map(children, depth)) for depth in depths)
  for node in range(len(trie.lows_N)):  # in order, the end first
    tokens = trie.tokens_E[trie.starts_N1[node]:trie.starts_N1[node + 1]]
    keys = np.where(tokens == EOS, -1, tokens)
    assert (np.diff(keys) > 0).all()
  found = trie.text_tokens(np.arange(len(texts)))
  assert [tuple(row[:length]) for row, length in zip(found, trie.lengths_T, strict=True)] == texts
  assert (found[np.arange(found.shape[1])[None] >= trie.lengths_T[:, None]] == EOS).all()


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 6))
def test_it_is_the_dictionary_of_beginnings(items, max_item_tokens):
  check(items, build(items, max_item_tokens), max_item_tokens)


def test_the_check_sees_a_wrong_range_a_wrong_token_and_a_wrong_order():
  items = [[5, 4], [5], [5, 4, 2], [1], [5]]
  trie = build(items)
  check(items, trie)
  for name, place in [('highs_N', 1), ('lows_N', 3), ('tokens_E', 0), ('texts_I', 1), ('lengths_T', 0), ('starts_N1', 1)]:
    wrong = getattr(trie, name).copy()
    wrong[place] += 1
    with pytest.raises(AssertionError):
      check(items, dataclasses.replace(trie, **{name: wrong}))


@settings(max_examples=20, deadline=None)
@given(ITEMS, st.randoms())
def test_the_order_of_items_changes_nothing_but_their_texts(items, random):
  order = list(range(len(items)))
  random.shuffle(order)
  one, other = build(items), build([items[number] for number in order])
  assert other.texts_I.tolist() == one.texts_I[order].tolist()
  same(dataclasses.replace(other, texts_I=one.texts_I), one)


def same(one: Trie, other: Trie) -> None:
  for field in dataclasses.fields(Trie):
    a, b = getattr(one, field.name), getattr(other, field.name)
    assert type(a) is type(b) and np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(a, b)


def test_items_of_equal_tokens_share_a_text_also_when_these_are_cut():
  trie = build([[7, 8, 9], [7, 8], [7, 8, 9], [7]], max_item_tokens=2)
  assert trie.texts_I.tolist() == [1, 1, 1, 0] and trie.lengths_T.tolist() == [1, 2]
  # The root; 7; its end and 8; the end of 7 8.
  assert trie.starts_N1.tolist() == [0, 1, 3, 3, 4, 4] and trie.tokens_E.tolist() == [7, EOS, 8, EOS]
  assert trie.lows_N.tolist() == [0, 0, 0, 1, 1] and trie.highs_N.tolist() == [2, 2, 1, 2, 2]


def test_types_are_those_of_devices():
  trie = build([[5, 4], [5]])
  for name in ('starts_N1', 'tokens_E', 'lows_N', 'highs_N', 'texts_I', 'lengths_T'):
    assert getattr(trie, name).dtype == np.int32, name
  assert trie.text_tokens(np.zeros((2, 0), np.int64)).shape == (2, 0, 0)
  assert trie.text_tokens(np.asarray([[0, 1], [1, 0]])).tolist() == [[[5, EOS], [5, 4]], [[5, 4], [5, EOS]]]


def test_a_saved_trie_is_the_same_and_holds_no_pickle(tmp_path):
  trie = build([[5, 4], [5], [9, 9, 9], [5]])
  trie.save(tmp_path / 'trie.npz')
  same(Trie.load(tmp_path / 'trie.npz'), trie)
  with np.load(tmp_path / 'trie.npz', allow_pickle=False) as stored:
    assert all(stored[name].dtype != object for name in stored.files)


def test_a_file_of_something_else_is_an_error(tmp_path):
  np.savez(tmp_path / 'other.npz', x=np.zeros(3))
  with pytest.raises(KeyError, match='starts_N1'):
    Trie.load(tmp_path / 'other.npz')


@pytest.mark.parametrize('items, match', [([[5], [], [4]], 'Item 1 has no tokens'), ([], 'no items'),
                                          ([[5], [4], [4, EOS, 5]], f'Item 2 has the end, token {EOS}')])
def test_bad_items_are_named(items, match):
  with pytest.raises(ValueError, match=match):
    build(items)


def test_nothing_is_cut_to_nothing():
  with pytest.raises(ValueError, match='max_item_tokens = 0'):
    build([[5]], max_item_tokens=0)
