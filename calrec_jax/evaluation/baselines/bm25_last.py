"""The BM25-of-last-items baseline: items whose text is like the text of what was bought last. Nothing is trained."""

from collections.abc import Callable

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.ranking.bm25 import LUCENE, Bm25, Bm25Options
from calrec_jax.ranking.catalogue import indexed_texts
from calrec_jax.text.templates import ItemTemplate

LAST_N = 1
PAPER = ItemTemplate()  # the paper's


def scorer(
  histories: Histories, split: str, template: ItemTemplate = PAPER, *, bm25: Bm25Options = LUCENE, last_n: int = LAST_N
) -> Callable[[int], np.ndarray]:
  """A function from user to float64 [I]: BM25 of the joined texts of the last items before the target against each item.

  It is the sum of these items' own BM25 scores. They are candidates like all others, and are mostly at the top.

  Args:
    histories: the data set.
    split: `test` or `validation`.
    template: how items are written, unless `bm25` names its own fields; query and index are written alike.
    bm25: which BM25.
    last_n: how many items before the target are the query.
  """
  if last_n < 1:
    raise UserError(f'BM25 of the last items: last_n = {last_n}; give at least 1.')
  texts = indexed_texts(histories.items, template, bm25.fields)
  index = Bm25(texts, bm25)

  def scores_I(user: int) -> np.ndarray:
    context = histories.seen(user, split)[:-1]
    return index.scores([' '.join(texts[item] for item in context[-last_n:])])[0]

  return scores_I
