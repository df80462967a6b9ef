"""What SeqIO's evaluation of a Task reports. It judges texts; `calrec evaluate` ranks the items of the catalogue."""

from collections.abc import Sequence

import numpy as np


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
  """The share of targets whose text was written, whatever space is around it."""
  same = [target.strip() == prediction.strip() for target, prediction in zip(targets, predictions, strict=True)]
  return {'exact_match': float(np.mean(same))}


def log_likelihood(targets: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
  """The mean log-probability of a target's text and its end, nats."""
  del targets
  return {'log_likelihood': float(np.mean(scores))}
