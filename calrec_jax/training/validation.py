"""Validation: loss terms of the held-out targets, and what retrieval of them is judged by."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import OnePass, TextPass
from calrec_jax.training import partitioning
from calrec_jax.training.train_step import make_embed_texts, make_eval_step


@dataclasses.dataclass(frozen=True)
class Embedded:
  """Users, and the texts of the catalogues that they buy from.

  Attributes:
    users_ND: float32, v_U of N users, not normalised.
    targets_N: int64, the text that each buys next.
    sources_N: int64, the data set of each.
    seen_N: for each, the texts of the other items bought before, each item once.
    repeats_N: bool, whether the target had been bought before.
    texts_TD: float32, v_T of every text; row 0 is none.
    items_T: for each of these data sets, int64 [T]: how many of its items have the text.
  """

  users_ND: np.ndarray
  targets_N: np.ndarray
  sources_N: np.ndarray
  seen_N: list[np.ndarray]
  repeats_N: np.ndarray
  texts_TD: np.ndarray
  items_T: dict[int, np.ndarray]


Judge = Callable[[Embedded], dict[str, float]]


class Validation:
  """Judges parameters by the held-out target of a fixed set of users."""

  def __init__(self, batches: OnePass, model: TwoTower, mesh: jax.sharding.Mesh, param_shardings: Any,
               judge: Judge | None = None):
    """`judge` turns embeddings into metrics; None: the loss terms alone."""
    self._batches, self._objective, self._judge = batches, model.objective, judge
    self._sharding = partitioning.batch_sharding(mesh)
    self._eval_step = make_eval_step(model, mesh, param_shardings)
    self._embed_texts = make_embed_texts(model, mesh, param_shardings)

  @functools.cached_property
  def _items_T(self) -> dict[int, np.ndarray]:
    corpus = self._batches.corpus
    return {int(source): np.bincount(corpus.text_ids[corpus.item_sources == source], minlength=len(corpus.text_items))
            for source in np.unique(self._batches.sources)}

  @functools.cached_property
  def _texts(self) -> TextPass:
    """The texts of these catalogues; packed for the first evaluation, not before the first step."""
    texts = np.flatnonzero(sum(self._items_T.values()))
    return TextPass(self._batches.corpus, texts, batch_size=self._batches.shapes.B, length=self._batches.shapes.L)

  def __len__(self) -> int:
    return len(self._batches)

  def __call__(self, params: Any) -> dict[str, float]:
    """Loss terms over all batches: L_NIG as a mean over target tokens, the contrastive terms over spans; `loss` is theirs;
    and what the judge finds."""
    rows, users = [], []
    for step in tqdm.trange(len(self._batches), desc='validation', leave=False, file=sys.stderr, disable=None):
      metrics, users_BED = jax.device_get(self._eval_step(params, self._global(self._batches, step)))
      rows.append(metrics)
      users.append(users_BED.reshape(-1, users_BED.shape[-1])[self._batches.spans(step)])
    losses = mean_losses(rows, self._objective)
    if self._judge is None:
      return losses
    texts_TD = np.zeros((len(self._batches.corpus.text_items), users[0].shape[-1]), np.float32)
    for step in range(len(self._texts)):
      slots_BSD = np.asarray(self._embed_texts(params, self._global(self._texts, step)))
      texts, slots = self._texts.slots(step)
      texts_TD[texts] = slots_BSD.reshape(-1, slots_BSD.shape[-1])[slots]
    return losses | self._judge(Embedded(np.concatenate(users), self._batches.targets, self._batches.sources,
                                         *self._batches.seen, texts_TD, self._items_T))

  def _global(self, batches: OnePass | TextPass, step: int) -> dict[str, jax.Array]:
    return partitioning.global_batch(lambda rows: batches.batch(step, rows), batches.shapes.B, self._sharding)


def mean_losses(rows: list[dict[str, Any]], objective: Objective) -> dict[str, float]:
  """The terms of many batches as those of one: each is a mean over what the batches' are means over."""
  weight_of = {'nig': 'target_tokens', 'tt': 'spans', 'ut': 'spans'}
  means = {name: sum(float(row[name]) * float(row[weight]) for row in rows) / max(sum(float(row[weight]) for row in rows), 1)
           for name, weight in weight_of.items()}
  return {'loss': float(objective.total(**means)), **means}
