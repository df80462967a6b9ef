"""BM25 of texts against every item of a catalogue, through bm25s (method: Inference).

bm25s computes, when it indexes, what each word adds to the score of each item that has it. A query's score is then a
sum over its words. We take that sparse matrix, and sum for all texts of a user at once.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse

from calrec_jax.errors import UserError

METHODS = ('lucene', 'robertson', 'atire', 'bm25l', 'bm25+')

# What a word adds is rounded to a multiple of 2^-32. A float64 adds such numbers without error (up to 2^20, far above
# any score), so a score does not depend on the order of the words, and items that BM25 cannot tell apart tie exactly.
_GRAIN = 2.0**-32

# Words that more than one in so many items have ('Title', 'Brand', ...) make up most of the work. They are summed by a
# dense product, the others by a sparse one: five times as fast as sparse alone on real catalogues.
_DENSE_ABOVE = 1 / 16


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
  """

  method: str = 'lucene'
  k1: float = 1.5
  b: float = 0.75
  delta: float = 0.5
  word: str = r'\w+'
  lower: bool = True

  def __post_init__(self):
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
    return [match.group() for match in re.finditer(self.word, text.lower() if self.lower else text)]


LUCENE = Bm25Options()


class Bm25:
  """An index over the texts of all items.

  A text's score against an item is the sum over the text's words, a repeated word counted each time, of the word's
  weight in that item; a word that no item has adds nothing. Scores are >= 0, without unit. Lucene's weight is
  ln(1 + (I - df + 1/2) / (df + 1/2)) * tf / (tf + k1 (1 - b + b length / mean length)), lengths in words.
  """

  def __init__(self, texts: Sequence[str], options: Bm25Options = LUCENE):
    """Indexes I texts, one an item; equal texts are items of their own (they count in df and in the mean length)."""
    self.options = options
    self._number_of: dict[str, int] = {}
    number = self._number_of
    numbers = [[number.setdefault(word, len(number)) for word in options.words(text)] for text in texts]
    weights_VI, self._absent_V = _weights(numbers, number, options)
    n_items_V = np.diff(weights_VI.indptr)
    common_V = n_items_V > _DENSE_ABOVE * len(texts)
    self._common = np.flatnonzero(common_V)
    self._common_CI = weights_VI[self._common].toarray()
    weights_VI.data[np.repeat(common_V, n_items_V)] = 0
    weights_VI.eliminate_zeros()
    self._rare_VI = weights_VI

  def scores(self, texts: Sequence[str]) -> np.ndarray:
    """float64 [G, I]: the score of each of G texts against each item. Items with the same words score the same."""
    count_GV = self._counts(texts)
    scores_GI = count_GV[:, self._common].toarray() @ self._common_CI
    scores_GI += (count_GV @ self._rare_VI).toarray()
    if self._absent_V is not None:
      scores_GI += (count_GV @ self._absent_V)[:, None]
    return scores_GI

  def _counts(self, texts: Sequence[str]) -> scipy.sparse.csr_matrix:
    """float64 [G, V], sparse: how often each text has each of the catalogue's words."""
    rows = [[self._number_of[word] for word in self.options.words(text) if word in self._number_of] for text in texts]
    starts = np.cumsum([0, *map(len, rows)])
    numbers = np.fromiter((number for row in rows for number in row), np.int32, starts[-1])
    counts = scipy.sparse.csr_matrix((np.ones(len(numbers)), numbers, starts), (len(rows), len(self._number_of)))
    counts.sum_duplicates()
    return counts


def _weights(
  numbers: list[list[int]], number_of: dict[str, int], options: Bm25Options
) -> tuple[scipy.sparse.csr_matrix, np.ndarray | None]:
  """(float64 [V, I] sparse, float64 [V] or None): each word's weight in items that have it; in items that do not.

  `bm25l` and `bm25+` give weight to an absent word too. It is the same for all items, and is kept apart from the
  matrix, which holds what presence adds to it.
  """
  shape = len(number_of), len(numbers)
  if not number_of:  # no text has a word: bm25s would divide by the mean length, 0
    return scipy.sparse.csr_matrix(shape), None
  # Imported late: on import bm25s computes something with JAX, which takes the accelerators.
  import bm25s
  logging.getLogger('bm25s').setLevel(logging.INFO)
  index = bm25s.BM25(
    method=options.method, k1=options.k1, b=options.b, delta=options.delta, dtype='float64', backend='numpy')
  index.index((numbers, number_of), create_empty_token=False, show_progress=False)
  columns = index.scores['data'], index.scores['indices'], index.scores['indptr']
  weights_VI = scipy.sparse.csr_matrix(columns, shape)  # bm25s keeps [I, V] by columns: [V, I] by rows
  weights_VI.data = _rounded(weights_VI.data)
  absent_V = index.nonoccurrence_array
  return weights_VI, None if absent_V is None else _rounded(absent_V)


def _rounded(values: np.ndarray) -> np.ndarray:
  return np.rint(values / _GRAIN) * _GRAIN
