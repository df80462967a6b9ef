"""BM25 of texts against every item of a catalogue (method: Inference).

As bm25s does (Lu 2024), an index holds what each word adds to the score of each item that has it. A query's score is
then a sum over its words. We sum for all texts of a user at once. bm25s keeps these weights only, and every weight
changes with the number of items and their mean length. We keep the counts of words, from which weights follow in a few
array operations: an index can grow without reading its old texts again.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from calrec_jax import outputs
from calrec_jax.errors import UserError

METHODS = ('lucene', 'robertson', 'atire', 'bm25l', 'bm25+')

# What a word adds is rounded to a multiple of 2^-32. A float64 adds such numbers without error (up to 2^20, far above
# any score), so a score does not depend on the order of the words, and items that BM25 cannot tell apart tie exactly.
_GRAIN = 2.0**-32

# Words that more than one in so many items have ('Title', 'Brand', ...) make up most of the work. They are summed by a
# dense product, the others by a sparse one: seven times as fast as sparse alone on a real catalogue.
_DENSE_ABOVE = 1 / 16

_FORMAT = 1  # of the file


@dataclasses.dataclass(frozen=True)
class Bm25Options:
  """Which BM25, and what its words are. No stop words, no stemming: the words of a brand or a size count in full.

  Attributes:
    method: one of `METHODS`, as bm25s has them (Kamphuis et al. 2020; the paper does not say which it uses).
    k1: how slowly a repeated word saturates, > 0.
    b: how much long texts are held back, 0 to 1.
    delta: lower bound of a word's effect; `bm25l` and `bm25+` only.
    word: regular expression of a word.
    lower: whether case is ignored.
    fields: the fields of an item that are indexed, written as in its text; None: those of its text.
  """

  method: str = 'lucene'
  k1: float = 1.5
  b: float = 0.75
  delta: float = 0.5
  word: str = r'\w+'
  lower: bool = True
  fields: tuple[str, ...] | None = None

  def __post_init__(self):
    if self.fields is not None:
      object.__setattr__(self, 'fields', tuple(self.fields))  # lists come out of JSON
    if self.method not in METHODS:
      raise UserError(f'bm25 method = {self.method!r}: choose one of {", ".join(METHODS)}.')
    for name, value, fits, range_ in (
      ('k1', self.k1, self.k1 > 0, 'above 0'), ('b', self.b, 0 <= self.b <= 1, 'from 0 to 1'),
      ('delta', self.delta, self.delta >= 0, 'from 0 up'),
    ):
      if not (fits and math.isfinite(value)):
        raise UserError(f'bm25 {name} = {value}: give a finite number {range_}.')
    try:
      re.compile(self.word)
    except re.error as error:
      raise UserError(f'bm25 word = {self.word!r}: not a regular expression ({error}).') from error

  def words(self, text: str) -> list[str]:
    """The words of a text, in order, repeated ones repeated."""
    text = text.lower() if self.lower else text
    if self._pattern.groups:  # findall would give the groups
      return [match.group() for match in self._pattern.finditer(text)]
    return self._pattern.findall(text)

  @functools.cached_property
  def _pattern(self) -> re.Pattern:
    return re.compile(self.word)


LUCENE = Bm25Options()


@dataclasses.dataclass(frozen=True)
class _Counts:
  """What is counted in the texts of I items; all of an index follows from it.

  Attributes:
    number_of: V words, each with its number, in order of first appearance.
    tf_VI: int32, sparse by rows: how often each item has each word.
    length_I: int64, in words.
  """

  number_of: dict[str, int]
  tf_VI: scipy.sparse.csr_matrix
  length_I: np.ndarray

  def and_of(self, texts: Sequence[str], options: Bm25Options) -> '_Counts':
    """Those of the same items followed by the ones with these texts. `self` stays as it is."""
    number_of = collections.defaultdict(None, self.number_of)
    number_of.default_factory = number_of.__len__  # a new word gets the next number
    numbers = [list(map(number_of.__getitem__, options.words(text))) for text in texts]
    lengths = np.fromiter(map(len, numbers), np.int64, len(numbers))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.fromiter(itertools.chain.from_iterable(numbers), np.int32, starts[-1])
    ones = np.ones(len(flat), np.int32)
    tf_VI = scipy.sparse.csr_matrix((ones, flat, starts), (len(texts), len(number_of))).tocsc().T
    tf_VI.sum_duplicates()
    n_new = len(number_of) - len(self.number_of)
    old = self.tf_VI
    padded = np.concatenate([old.indptr, np.full(n_new, old.indptr[-1], old.indptr.dtype)])
    old_VI = scipy.sparse.csr_matrix((old.data, old.indices, padded), (len(number_of), old.shape[1]))
    return _Counts(
      dict(number_of), scipy.sparse.hstack([old_VI, tf_VI], format='csr'), np.concatenate([self.length_I, lengths]))


_NOTHING = _Counts({}, scipy.sparse.csr_matrix((0, 0), dtype=np.int32), np.zeros(0, np.int64))


class Bm25:
  """An index over the texts of all items.

  A text's score against an item is the sum over the text's words, a repeated word counted each time, of the word's
  weight in that item; a word that no item has adds nothing. Scores are >= 0, without unit. Lucene's weight is
  ln(1 + (I - df + 1/2) / (df + 1/2)) * tf / (tf + k1 (1 - b + b length / mean length)), lengths in words.
  """

  def __init__(self, texts: Sequence[str], options: Bm25Options = LUCENE):
    """Indexes I texts, one an item; equal texts are items of their own (they count in df and in the mean length)."""
    self._fill(_NOTHING.and_of(texts, options), options)

  def _fill(self, counts: _Counts, options: Bm25Options) -> None:
    self.options = options
    self._counts = counts
    self._weights_VI, self._absent_V = _weights(counts, options)
    common_V = np.diff(self._weights_VI.indptr) > _DENSE_ABOVE * len(self)
    self._common_CI = self._weights_VI[np.flatnonzero(common_V)].toarray()
    self._common_of_V = np.where(common_V, np.cumsum(common_V) - 1, -1)  # row of _common_CI, -1: none

  def __len__(self) -> int:
    """The number of items."""
    return len(self._counts.length_I)

  def with_items(self, texts: Sequence[str]) -> 'Bm25':
    """A new index: of the same items, followed by the ones with these texts.

    Its scores are, bit for bit, those of an index of all texts. The old texts are not read again.
    """
    return self._of(self._counts.and_of(texts, self.options), self.options)

  def scores(self, texts: Sequence[str]) -> np.ndarray:
    """float64 [G, I]: the score of each of G texts against each item. Items with the same words score the same."""
    number_of = self._counts.number_of
    numbers = [[number_of[word] for word in self.options.words(text) if word in number_of] for text in texts]
    n_texts, n_items, n_common = len(texts), len(self), len(self._common_CI)
    text_N = np.repeat(np.arange(n_texts), list(map(len, numbers)))  # N words, all texts' one after the other
    number_N = np.fromiter(itertools.chain.from_iterable(numbers), np.int64, len(text_N))
    common_N = self._common_of_V[number_N]
    rare_N = common_N < 0
    count_GC = np.bincount((text_N * n_common + common_N)[~rare_N], minlength=n_texts * n_common)
    scores_GI = count_GC.reshape(n_texts, n_common).astype(np.float64) @ self._common_CI
    # One large array only, to which all else is added in place: memory fresh from the system costs more than the sums.
    rare_GV = scipy.sparse.csr_matrix(
      (np.ones(rare_N.sum()), (text_N[rare_N], number_N[rare_N])), (n_texts, len(number_of)))
    rare_GI = (rare_GV @ self._weights_VI).tocoo()
    scores_GI.reshape(-1)[rare_GI.row * np.int64(n_items) + rare_GI.col] += rare_GI.data
    if self._absent_V is not None:
      scores_GI += np.bincount(text_N, self._absent_V[number_N], n_texts)[:, None]
    return scores_GI

  def save(self, path: str | os.PathLike) -> None:
    """Writes the index as one file, whole or not at all, in NumPy's .npz format without pickled objects."""
    tf_VI = self._counts.tf_VI
    head = {'format': _FORMAT, 'options': dataclasses.asdict(self.options), 'words': list(self._counts.number_of)}
    arrays = {
      'head': np.frombuffer(json.dumps(head).encode('ascii'), np.uint8),
      'tf': tf_VI.data, 'items': tf_VI.indices, 'starts': tf_VI.indptr, 'lengths': self._counts.length_I}
    with outputs.new_file(path) as scratch, scratch.open('wb') as file:
      np.savez(file, **arrays)

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Bm25':
    """The index that `save` wrote: with the same options and, bit for bit, the same scores.

    Raises UserError if the file is missing, damaged, or of another format.
    """
    try:
      with np.load(path, allow_pickle=False) as file:
        head = json.loads(file['head'].tobytes())
        if head['format'] != _FORMAT:
          raise UserError(f'{path}: a BM25 index of format {head["format"]}, this version reads {_FORMAT}; build it anew.')
        words, length_I = head['words'], file['lengths']
        tf_VI = scipy.sparse.csr_matrix((file['tf'], file['items'], file['starts']), (len(words), len(length_I)))
      tf_VI.check_format()
      options = Bm25Options(**head['options'])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(f'{path}: not a BM25 index ({error}); build it anew.') from error
    return cls._of(_Counts({word: number for number, word in enumerate(words)}, tf_VI, length_I), options)

  @classmethod
  def _of(cls, counts: _Counts, options: Bm25Options) -> 'Bm25':
    index = cls.__new__(cls)
    index._fill(counts, options)
    return index


def _weights(counts: _Counts, options: Bm25Options) -> tuple[scipy.sparse.csr_matrix, np.ndarray | None]:
  """(float64 [V, I] sparse, float64 [V] or None): what a word adds in items that have it; the weight of its absence.

  `bm25l` and `bm25+` give weight to an absent word too. It is the same for all items, and is kept apart from the
  matrix, which holds what presence adds to it. Every entry depends on its word's df, and its item's tf and length
  alone, by operations that IEEE 754 rounds correctly: equal ones give equal bits, wherever they lie in the arrays.
  """
  k1, b, tf_VI = options.k1, options.b, counts.tf_VI
  n_items_V = np.diff(tf_VI.indptr)
  idf_V = _idf(n_items_V, len(counts.length_I), options.method)
  # All variants' term frequency part is c / (c + k1), times k1 + 1 or not, with c = tf / norm; bm25l shifts c by delta.
  shift = options.delta if options.method == 'bm25l' else 0.0
  part_of_absent = shift / (shift + k1)
  scale_V = idf_V * (1 if options.method in ('lucene', 'robertson') else k1 + 1)
  mean = counts.length_I.sum() / max(len(counts.length_I), 1)
  with np.errstate(divide='ignore', invalid='ignore'):  # an item without words may have norm 0; no word asks for it
    inverse_I = 1 / (1 - b + b * (counts.length_I / mean))
  part = inverse_I[tf_VI.indices]  # in place from here on, as memory fresh from the system costs most
  part *= tf_VI.data
  part += shift + k1
  np.divide(-k1, part, out=part)
  part += 1 - part_of_absent  # c / (c + k1) is 1 - k1 / (c + k1)
  part *= np.repeat(scale_V, n_items_V)
  weights_VI = scipy.sparse.csr_matrix((_rounded(part), tf_VI.indices, tf_VI.indptr), tf_VI.shape)
  if options.method == 'bm25l':
    return weights_VI, _rounded(scale_V * part_of_absent)
  return weights_VI, _rounded(idf_V * options.delta) if options.method == 'bm25+' else None


def _idf(n_items_V: np.ndarray, n_items: int, method: str) -> np.ndarray:
  """float64 [V]: the weight of words that so many of `n_items` items have, each at least one."""
  formula = {
    'lucene': lambda df: 1 + (n_items - df + 0.5) / (df + 0.5),
    'robertson': lambda df: max((n_items - df + 0.5) / (df + 0.5), 1),
    'atire': lambda df: n_items / df,
    'bm25l': lambda df: (n_items + 1) / (df + 0.5),
    'bm25+': lambda df: (n_items + 1) / df,
  }[method]
  distinct, where_V = np.unique(n_items_V, return_inverse=True)
  # One logarithm a df, not NumPy's of an array: words of one df must weigh the same to the last bit.
  return np.array([math.log(formula(df)) for df in distinct.tolist()], np.float64)[where_V]


def _rounded(values: np.ndarray) -> np.ndarray:
  """`values`, rounded in place to multiples of `_GRAIN`."""
  values *= 1 / _GRAIN
  np.rint(values, out=values)
  values *= _GRAIN
  return values
