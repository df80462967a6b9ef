"""Several rankings become one: each item's score is a weighted sum over the rankings of 1 / (60 + its rank there).

With equal weights it is reciprocal rank fusion (Cormack, Clarke and Büttcher 2009); the weights can also be learned from users
whose next item is known. An item that a ranking does not list has nothing from it; tied items have the best rank of theirs.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize

from calrec_jax import outputs
from calrec_jax.errors import UserError
from calrec_jax.ranking.order import Ranked

OFFSET = 60
NAME = 'fusion.json'  # of a file of learned weights
_SCALE = OFFSET + 1  # makes the first place worth 1 while weights are learned

Lists = Mapping[str, Ranked]  # a user's, by the name of the ranker


def fuse(lists: Lists, weights: Mapping[str, float] | None = None) -> Ranked:
  """The rankings of one user as one, with weights by name; None: all 1. A ranker without a weight has none."""
  items, gains_CR = _gains(lists)
  weights_R = np.asarray([1.0 if weights is None else weights.get(name, 0.0) for name in lists])
  scores_C = gains_CR @ weights_R
  order_C = np.lexsort((items, -scores_C))
  return Ranked(items[order_C], scores_C[order_C])


def learn(users: Sequence[Lists], targets: Sequence[int]) -> dict:
  """Weights that make the items bought probable, and what each ranking adds.

  The weights w >= 0 maximise the mean log of softmax(gains · w) at the target, over users whose target any ranking lists. What
  they are worth is measured on every second user with the weights of the others. A ranking without which that is better has
  weight 0: the terms differ so little from place to place that a small weight of a poor ranking reorders neighbours.

  Returns:
    `weights` by name, of all users; `users` that were learned from; `ndcg@10` of each ranking alone and of `fused`, and
    `gain`: how much of the latter is lost where a ranking is left out and the weights are learned anew; below 0 for one that
    is left out.

  Raises:
    UserError: no user's target is listed.
  """
  names = list(users[0]) if users else []
  cases = [(*_gains(lists), target) for lists, target in zip(users, targets, strict=True)]
  halves = cases[::2], cases[1::2]
  def held_out(kept: list[int]) -> float:
    parts = [_ndcg(other, _fit(half, kept, len(names))) for half, other in (halves, halves[::-1])]
    return float(np.concatenate(parts).mean())
  n_used = sum(bool((items == target).any()) for items, _, target in cases)
  if not n_used:
    raise UserError('Fusion: no ranking lists the next item of any validation user; there is nothing to learn from.')
  kept, gain = list(range(len(names))), {}
  fused = held_out(kept)
  while len(kept) > 1:
    without = {number: held_out([other for other in kept if other != number]) for number in kept}
    gain |= {names[number]: fused - value for number, value in without.items()}
    worst = max(without, key=without.get)
    if without[worst] <= fused:
      break
    kept.remove(worst)
    fused = without[worst]
  weights_R = _fit(cases, kept, len(names))
  alone = {name: float(_ndcg(cases, np.eye(len(names))[number]).mean()) for number, name in enumerate(names)}
  return {'weights': dict(zip(names, weights_R.tolist(), strict=True)), 'users': n_used, 'ndcg@10': {**alone, 'fused': fused},
          'gain': gain}


def write_weights(folder: str | os.PathLike, learned: Mapping) -> None:
  """Writes what `learn` found into the folder."""
  outputs.write_json(pathlib.Path(folder) / NAME, learned)


def read_weights(path: str | os.PathLike) -> dict[str, float]:
  """The weights of a file, or of the folder that `calrec infer` wrote on the validation split. UserError if there are none."""
  path = pathlib.Path(path)
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


def _gains(lists: Lists) -> tuple[np.ndarray, np.ndarray]:
  """(the items that any ranking lists, what they have from each: float64 [C, R])."""
  items = np.unique(np.concatenate([np.zeros(0, np.int64), *(ranked.items for ranked in lists.values())]))
  gains_CR = np.zeros((len(items), len(lists)))
  for number, ranked in enumerate(lists.values()):
    rank_K = np.searchsorted(-ranked.scores, -ranked.scores, side='left') + 1  # the first place of a tie
    gains_CR[np.searchsorted(items, ranked.items), number] = 1 / (OFFSET + rank_K)
  return items, gains_CR


def _fit(cases: Sequence[tuple], kept: list[int], n_rankings: int) -> np.ndarray:
  """float64 [R], 0 for rankings that are not kept; all equal where nothing can be learned."""
  weights_R = np.zeros(n_rankings)
  known = [(gains_CR[:, kept] * _SCALE, int(np.flatnonzero(items == target)[0])) for items, gains_CR, target in cases
           if (items == target).any()]
  weights_R[kept] = 1.0
  if not known or not kept:
    return weights_R

  def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
    total, slope = 0.0, np.zeros(len(w))
    for gains_CK, own in known:
      scores_C = gains_CK @ w
      scores_C -= scores_C.max()
      weight_C = np.exp(scores_C)
      total += np.log(weight_C.sum()) - scores_C[own]
      slope += weight_C @ gains_CK / weight_C.sum() - gains_CK[own]
    return total / len(known) + 1e-4 * w @ w, slope / len(known) + 2e-4 * w  # a little decay, so that a minimum exists

  weights_R[kept] = scipy.optimize.minimize(loss, np.ones(len(kept)), jac=True, method='L-BFGS-B',
                                            bounds=[(0, None)] * len(kept)).x
  return weights_R


def _ndcg(cases: Sequence[tuple], weights_R: np.ndarray) -> np.ndarray:
  """NDCG@10 of each case; the mean over the places of a tie, 0 where the target is not listed."""
  found = []
  for items, gains_CR, target in cases:
    scores_C = gains_CR @ weights_R
    own = scores_C[items == target]
    if not len(own):
      found.append(0.0)
      continue
    better, tied = int((scores_C > own[0]).sum()), int((scores_C == own[0]).sum())
    ranks = np.arange(better + 1, better + tied + 1)
    found.append(float(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean()))
  return np.asarray(found)
