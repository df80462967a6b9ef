"""The best evaluation of a run so far, by which its best checkpoint is kept and training may stop early."""

import dataclasses
from typing import Any

LOSSES = ('loss', 'nig', 'tt', 'ut')  # the lower, the better
RETRIEVAL = ('recall@10', 'ndcg@10', 'recall@10_unseen', 'ndcg@10_unseen')  # the higher, the better


@dataclasses.dataclass(frozen=True)
class Best:
  """The best evaluation so far.

  Attributes:
    metric: by which it is the best.
    step: after which it was made; None: none was.
    value: of the metric then.
    waited: evaluations since, none of which was better.
  """

  metric: str
  step: int | None = None
  value: float | None = None
  waited: int = 0

  def after(self, step: int, metrics: dict[str, float]) -> 'Best':
    """The best one when one more evaluation is in; an equal one is no better. Unchanged where it has not the metric."""
    if self.metric not in metrics:
      return self
    value = metrics[self.metric]
    better = self.value is None or (value < self.value if self.metric in LOSSES else value > self.value)
    return Best(self.metric, step, value) if better else dataclasses.replace(self, waited=self.waited + 1)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)
