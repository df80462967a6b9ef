"""Several rankings become one: each item's score is a weighted sum over the rankings of 1 / (60 + its rank there).

With equal weights it is reciprocal rank fusion (Cormack, Clarke and Büttcher 2009); the weights can also be learned from users
whose next item is known (`evaluation.fusion_weights`). An item that a ranking does not list has nothing from it; tied items
have the best rank of theirs.
"""

import json
import math
import os
from collections.abc import Mapping

import numpy as np

from calrec_jax import outputs, storage
from calrec_jax.errors import UserError
from calrec_jax.ranking.order import Ranked

OFFSET = 60
NAME = 'fusion.json'  # of a file of learned weights

Lists = Mapping[str, Ranked]  # a user's, by the name of the ranker


def fuse(lists: Lists, weights: Mapping[str, float] | None = None) -> Ranked:
  """The rankings of one user as one, with weights by name; None: all 1. A ranker without a weight has none."""
  items, gains_CR = gains(lists)
  weights_R = np.asarray([1.0 if weights is None else weights.get(name, 0.0) for name in lists])
  scores_C = gains_CR @ weights_R
  order_C = np.lexsort((items, -scores_C))
  return Ranked(items[order_C], scores_C[order_C])


def write_weights(folder: str | os.PathLike, learned: Mapping) -> None:
  """Writes what `learn` found into the folder."""
  outputs.write_json(storage.join(folder, NAME), learned)


def read_weights(path: str | os.PathLike) -> dict[str, float]:
  """The weights of a file, or of the folder that `calrec infer` wrote on the validation split. UserError if there are none."""
  path = storage.local(path)
  path = path / NAME if path.is_dir() else path
  try:
    weights = json.loads(path.read_text(encoding='utf-8'))['weights']
    weights = {str(name): float(weight) for name, weight in weights.items()}
    if not all(0 <= weight < math.inf for weight in weights.values()):
      raise ValueError
    return weights
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path}: no weights of a fusion ({type(error).__name__}); `calrec infer` with SPLIT = \'validation\' and '
                    "the ranker 'fused' writes them.") from error


def gains(lists: Lists) -> tuple[np.ndarray, np.ndarray]:
  """(the items that any ranking lists, what they have from each: float64 [C, R])."""
  items = np.unique(np.concatenate([np.zeros(0, np.int64), *(ranked.items for ranked in lists.values())]))
  gains_CR = np.zeros((len(items), len(lists)))
  for number, ranked in enumerate(lists.values()):
    rank_K = np.searchsorted(-ranked.scores, -ranked.scores, side='left') + 1  # the first place of a tie
    gains_CR[np.searchsorted(items, ranked.items), number] = 1 / (OFFSET + rank_K)
  return items, gains_CR
