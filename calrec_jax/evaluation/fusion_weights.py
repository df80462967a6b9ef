"""What each ranking is worth in a fusion: weights learned from users whose next item is known, see `ranking.rank_fusion`."""

from collections.abc import Sequence

import numpy as np
import scipy.optimize

from calrec_jax.errors import UserError
from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.evaluation.rankings import place
from calrec_jax.ranking.rank_fusion import OFFSET, Lists, gains

_SCALE = OFFSET + 1  # makes the first place worth 1 while weights are learned


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
  cases = [(*gains(lists), target) for lists, target in zip(users, targets, strict=True)]
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
  """NDCG@10 of each case, 0 where the target is not listed."""
  places = [place(gains_CR @ weights_R, int(np.flatnonzero(items == target)[0])) if (items == target).any() else (10, 0)
            for items, gains_CR, target in cases]
  better_U, tied_U = np.asarray(places, np.int64).reshape(-1, 2).T
  return expected_metrics(better_U, tied_U, recall_ks=(), ndcg_ks=(10,), mrr_ks=())['ndcg@10']
