"""Law 8, first half: BM25 is the ten-line brute force, for every variant, with exact ties; it grows, and is kept on disk."""

import collections
import functools
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import bm25s
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from calrec_jax.errors import UserError
from calrec_jax.ranking import bm25 as bm25_module
from calrec_jax.ranking.bm25 import METHODS, Bm25, Bm25Options

TEXTS = [
  'Title: The Big Glue. Category: Tapes, Glue. Brand: Gorilla. Price: Unknown.',
  'Title: Glue, big! Category: Glue Tapes. Brand: The Gorilla. Price: Unknown.',
  'Title: Vinyl Tubing 10-Foot. Category: Hoses. Brand: Watts. Price: 5.99.',
  'Title: 10 Hoses. Category: Unknown. Brand: Unknown. Price: Unknown.',
  'Title: 10 Hoses. Category: Unknown. Brand: Unknown. Price: Unknown.',
  'Title: Nitrile Gloves (100). Category: Safety. Brand: Dynarex. Price: 10.5.',
  'Ähnliches',
  '',
]
QUERIES = [
  'Title: Big glue glue glue. Brand: The Gorilla.',
  'the',
  'WATTS hoses 10 foot, never seen words',
  'nothing of it',
  '',
  TEXTS[3],
  'äHNLICHES tubing',
]

# Of each variant: idf(df, N), and the term frequency's part, of tf and norm = 1 - b + b * length / mean length.
FORMULAS = {
  'lucene': (lambda df, n: math.log(1 + (n - df + .5) / (df + .5)),
             lambda tf, norm, k1, delta: tf / (tf + k1 * norm)),
  'robertson': (lambda df, n: math.log(max((n - df + .5) / (df + .5), 1)),
                lambda tf, norm, k1, delta: tf / (tf + k1 * norm)),
  'atire': (lambda df, n: math.log(n / df),
            lambda tf, norm, k1, delta: tf * (k1 + 1) / (tf + k1 * norm)),
  'bm25l': (lambda df, n: math.log((n + 1) / (df + .5)),
            lambda tf, norm, k1, delta: (k1 + 1) * (tf / norm + delta) / (k1 + tf / norm + delta)),
  'bm25+': (lambda df, n: math.log((n + 1) / df),
            lambda tf, norm, k1, delta: (k1 + 1) * tf / (tf + k1 * norm) + delta),
}


def words(text):
  return re.findall(r'\w+', text.lower())


def brute_force(texts, queries, *, method='lucene', k1=1.5, b=.75, delta=.5, words=words):
  idf, part = FORMULAS[method]
  counts = [collections.Counter(words(text)) for text in texts]
  mean = sum(count.total() for count in counts) / len(texts)
  df = collections.Counter(word for count in counts for word in count)
  return np.array([[sum(
    idf(df[word], len(texts)) * part(count[word], 1 - b + b * count.total() / mean, k1, delta)
    for word in words(query) if word in df) for count in counts] for query in queries])


def check_law(scores):
  """`scores(texts, queries)` must be float64 [G, I], the brute force's to 1e-9 (what rounding may cost)."""
  np.testing.assert_allclose(scores(TEXTS, QUERIES), brute_force(TEXTS, QUERIES), rtol=0, atol=1e-8)


def ours(texts, queries, **options):
  return Bm25(texts, Bm25Options(**options)).scores(queries)


def distinct_query_words(texts, queries):
  return ours(texts, [' '.join(set(words(query))) for query in queries])


def without_stop_words(texts, queries):
  drop = functools.partial(re.compile(r'\bthe\b', re.I).sub, '')
  return ours([drop(text) for text in texts], [drop(query) for query in queries])


def over_distinct_texts(texts, queries):
  unique = list(dict.fromkeys(texts))
  return ours(unique, queries)[:, [unique.index(text) for text in texts]]


MUTANTS = {
  'distinct query words': distinct_query_words,
  'no stop words': without_stop_words,
  'document counts over distinct texts': over_distinct_texts,
  'with case': functools.partial(ours, lower=False),
  'no length': functools.partial(ours, b=0),
  'another k1': functools.partial(ours, k1=1.2),
  'another idf': functools.partial(ours, method='robertson'),
}


def test_bm25_is_the_brute_force():
  check_law(ours)


@pytest.mark.parametrize('mutant', MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_of_bm25_is_seen(mutant):
  with pytest.raises(AssertionError):
    check_law(mutant)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('numbers', [{}, {'k1': 0.9, 'b': 0.4, 'delta': 0.7}, {'k1': 3, 'b': 1, 'delta': 0}])
def test_each_variant_is_the_brute_force(method, numbers):
  filled = [text for text in TEXTS if text]  # with b = 1 a text without words has length factor 0
  expected = brute_force(filled, QUERIES, method=method, **numbers)
  np.testing.assert_allclose(ours(filled, QUERIES, method=method, **numbers), expected, rtol=0, atol=1e-8)


def test_the_formulas_and_the_options_name_the_same_variants():
  assert set(FORMULAS) == set(METHODS)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('numbers', [{}, {'k1': 0.9, 'b': 0.4, 'delta': 0.7}, {'k1': 3, 'b': 1, 'delta': 0}])
def test_bm25_is_what_bm25s_retrieves_with(method, numbers):
  index = bm25s.BM25(method=method, dtype='float64', **{'k1': 1.5, 'b': 0.75, 'delta': 0.5, **numbers})
  filled = [text for text in TEXTS if text]
  index.index([words(text) for text in filled], show_progress=False)
  for query in filter(words, QUERIES):
    np.testing.assert_allclose(ours(filled, [query], method=method, **numbers)[0], index.get_scores(words(query)), atol=1e-8)


few_words = st.lists(st.sampled_from('a b c dd Ee f9 title the x'.split()), max_size=6).map(' '.join)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(texts=st.lists(few_words, min_size=1, max_size=30), queries=st.lists(few_words, max_size=4))
def test_any_bm25_is_the_brute_force(texts, queries):
  hypothesis.assume(any(map(words, texts)))
  expected = brute_force(texts, queries).reshape(len(queries), len(texts))
  np.testing.assert_allclose(ours(texts, queries), expected, rtol=0, atol=1e-8)


def many_texts(rng, n):
  return [' '.join(rng.choice(list('abcdefghijklmnop'), size=rng.integers(3, 12))) for _ in range(n)]


def check_exact():
  """Neither the order of the items, nor of a text's words, nor the names of words, move a score by a single bit."""
  rng = np.random.default_rng(0)
  texts, queries = many_texts(rng, 60), many_texts(rng, 20)
  order = rng.permutation(60)
  shuffled_words = [' '.join(rng.permutation(text.split())) for text in texts]
  scores_GI = ours(texts, queries)
  np.testing.assert_array_equal(ours([texts[item] for item in order], queries), scores_GI[:, order])
  np.testing.assert_array_equal(ours(shuffled_words, queries), scores_GI)
  twice_GI = ours([*texts, *shuffled_words], queries)
  np.testing.assert_array_equal(twice_GI[:, :60], twice_GI[:, 60:])
  renamed, both = [text.upper() for text in texts], [f'{query} {query.upper()}' for query in queries]
  renamed_GI = ours([*texts, *renamed], both, lower=False)
  np.testing.assert_array_equal(renamed_GI[:, :60], renamed_GI[:, 60:])


def test_what_bm25_cannot_tell_apart_ties_exactly():
  check_exact()


def test_a_sum_that_is_not_rounded_is_seen(monkeypatch):
  monkeypatch.setattr(bm25_module, '_rounded', lambda values: values)
  with pytest.raises(AssertionError):
    check_exact()


@pytest.mark.parametrize('share', [0, 1 / 4, 1 / 2, 1], ids=['all dense', 'quarter', 'half', 'all sparse'])
def test_the_dense_and_the_sparse_sum_are_one_sum(share, monkeypatch):
  scores_GI = {method: ours(TEXTS, QUERIES, method=method) for method in METHODS}
  monkeypatch.setattr(bm25_module, '_DENSE_ABOVE', share)
  check_law(ours)
  for method in METHODS:
    np.testing.assert_array_equal(ours(TEXTS, QUERIES, method=method), scores_GI[method])


def test_a_text_that_matches_nothing_scores_zero_and_every_word_counts():
  scores_GI = ours(['the glue', 'the tape', 'the hose'], ['nothing', '', 'the', 'the the'])
  np.testing.assert_array_equal(scores_GI[:2], 0)
  assert (scores_GI[2] > 0).all()  # a word that is in every item still weighs
  np.testing.assert_array_equal(scores_GI[3], 2 * scores_GI[2])


@pytest.mark.parametrize('method', METHODS)
def test_no_text_at_all_and_catalogues_without_words(method):
  assert ours(TEXTS, [], method=method).shape == (0, len(TEXTS))
  assert ours([], ['glue'], method=method).shape == (1, 0)
  np.testing.assert_array_equal(ours(['', '...'], ['glue', ''], method=method), np.zeros((2, 2)))


# What is added: new words, known ones, a text once more, no word at all, nothing, and only known words.
ADDED = [['Gorilla hoses, anew and anew', '10', TEXTS[0]], ['', '...'], [], ['vinyl glue']]
GROWN_QUERIES = [*QUERIES, 'anew gorilla', 'vinyl']


def grown(first, added, options):
  index = Bm25(first, options)
  for texts in added:
    index = index.with_items(texts)
  return index


def with_old_weights(first, added, options):
  """A mutant: the new items are an index of their own, and the old weights stay."""

  class Joined:
    def scores(self, queries):
      return np.concatenate([Bm25(texts, options).scores(queries) for texts in [first, *added] if texts], axis=1)

  return Joined()


def with_old_words(first, added, options):
  """A mutant: words that the first texts do not have are left out, but for their lengths."""
  known = set(words(' '.join(first)))
  return grown(first, [[' '.join(w if w in known else f'_{i}' for i, w in enumerate(words(text))) for text in texts]
                       for texts in added], options)


def check_growth(grow, first=TEXTS, options=bm25_module.LUCENE):
  anew = Bm25([text for texts in [first, *ADDED] for text in texts], options)
  np.testing.assert_array_equal(grow(first, ADDED, options).scores(GROWN_QUERIES), anew.scores(GROWN_QUERIES))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('first', [TEXTS, TEXTS[:1], [''], []], ids=['texts', 'one text', 'no word', 'no text'])
def test_a_grown_index_is_the_index_of_all_texts_bit_for_bit(method, first):
  check_growth(grown, first, Bm25Options(method=method, k1=1.3, b=0.6, delta=0.3))


@pytest.mark.parametrize('mutant', [with_old_weights, with_old_words])
def test_a_mutant_of_growth_is_seen(mutant):
  with pytest.raises(AssertionError):
    check_growth(mutant)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(parts=st.lists(st.lists(few_words, max_size=12), min_size=1, max_size=5), method=st.sampled_from(METHODS))
def test_any_grown_index_is_the_index_of_all_texts(parts, method):
  options, queries = Bm25Options(method=method), ['a b c dd ee f9 title the x', 'the the x']
  anew = Bm25([text for texts in parts for text in texts], options)
  np.testing.assert_array_equal(grown(parts[0], parts[1:], options).scores(queries), anew.scores(queries))


def test_growth_reads_new_texts_only_and_leaves_the_old_index_as_it_is(monkeypatch):
  index, before_GI = Bm25(TEXTS), ours(TEXTS, QUERIES)
  read, read_words = [], Bm25Options.words
  monkeypatch.setattr(Bm25Options, 'words', lambda self, text: read.append(text) or read_words(self, text))
  assert len(index.with_items(['Watts', 'unheard'])) == len(TEXTS) + 2
  assert read == ['Watts', 'unheard']
  np.testing.assert_array_equal(index.scores(QUERIES), before_GI)
  assert len(index) == len(TEXTS)


@pytest.mark.parametrize('options', [
  {}, {'method': 'bm25+', 'k1': 0.9, 'b': 0.4, 'delta': 0.7, 'lower': False, 'word': r'\S+|\n'}])
def test_a_loaded_index_scores_and_grows_bit_for_bit(tmp_path, options):
  texts = [*TEXTS, 'a\nb "q" \0 \ud800 \u2028 ' + 1000 * 'ß']
  index = Bm25(texts, Bm25Options(**options))
  index.save(tmp_path / 'index')
  loaded = Bm25.load(tmp_path / 'index')
  assert loaded.options == index.options and list(tmp_path.iterdir()) == [tmp_path / 'index']
  queries = [*QUERIES, *texts]
  np.testing.assert_array_equal(loaded.scores(queries), index.scores(queries))
  np.testing.assert_array_equal(loaded.with_items(ADDED[0]).scores(queries), index.with_items(ADDED[0]).scores(queries))
  with np.load(tmp_path / 'index', allow_pickle=False) as file:  # raises if anything is pickled
    assert all(file[name].dtype != object for name in file)


@pytest.mark.parametrize('texts', [[], ['', '...']])
def test_an_index_without_words_is_kept(tmp_path, texts):
  Bm25(texts).save(tmp_path / 'index.npz')
  assert Bm25.load(tmp_path / 'index.npz').scores(['glue']).shape == (1, len(texts))


def damaged(data):
  """Name to what may be found in place of an index whose bytes are `data`."""

  arrays = dict(np.load(io.BytesIO(data)))

  def bytes_of(write, *args, **kwargs):
    file = io.BytesIO()
    write(file, *args, **kwargs)
    return file.getvalue()

  def with_head(**changes):
    head = json.dumps({**json.loads(arrays['head'].tobytes()), **changes})
    return bytes_of(np.savez, **{**arrays, 'head': np.frombuffer(head.encode(), np.uint8)})

  middle = len(data) // 2
  return {
    'nothing': b'', 'text': b'glue', 'array': bytes_of(np.save, np.zeros(3)), 'cut': data[:-30],
    'a flipped bit': data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:],
    'other arrays': bytes_of(np.savez, weights=np.zeros(3)),
    'an item that is not': bytes_of(np.savez, **{**arrays, 'items': arrays['items'] + len(TEXTS)}),
    'fewer lengths': bytes_of(np.savez, **{**arrays, 'lengths': arrays['lengths'][2:]}),
    'pickled': bytes_of(np.savez, **{**arrays, 'tf': arrays['tf'].astype(object)}),
    'format': with_head(format=99), 'options': with_head(options={'bias': 1}), 'words': with_head(words=['glue'])}


def test_a_file_that_is_no_index_is_named(tmp_path):
  path = tmp_path / 'index.npz'
  Bm25(TEXTS).save(path)
  for name, data in damaged(path.read_bytes()).items():
    path.write_bytes(data)
    with pytest.raises(UserError, match='index.npz.*build it anew'):
      Bm25.load(path)
      pytest.fail(name)
  with pytest.raises(UserError, match='absent.npz'):
    Bm25.load(tmp_path / 'absent.npz')


def test_importing_the_ranker_does_not_start_jax():
  code = 'import sys, calrec_jax.evaluation.evaluate; print({"jax", "bm25s"} & set(sys.modules))'
  root = pathlib.Path(__file__).resolve().parents[2]
  found = subprocess.run([sys.executable, '-c', code], cwd=root, check=True, capture_output=True, text=True)
  assert found.stdout == 'set()\n'


def test_the_word_pattern_is_an_option():
  by_characters = Bm25Options(word=r'\w')
  assert by_characters.words('Ab 1') == ['a', 'b', '1']
  assert Bm25Options(word=r'(\d)+x').words('10x 5x') == ['10x', '5x']  # a group does not shorten a word
  assert Bm25Options(word=r'(?:\d)+x').words('10x 5x') == ['10x', '5x']


@pytest.mark.parametrize(('options', 'told'), [
  ({'method': 'bm26'}, 'bm25l'), ({'k1': 0}, 'k1 = 0'), ({'b': 1.5}, 'from 0 to 1'), ({'b': math.nan}, 'b = nan'),
  ({'delta': math.inf}, 'delta'), ({'word': '('}, 'regular expression'),
])
def test_options_out_of_range(options, told):
  with pytest.raises(UserError, match=re.escape(told)):
    Bm25Options(**options)
