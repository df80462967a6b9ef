"""What a run measures between two log lines, and how it says it."""

import collections
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.flops import peak_flops, training_flops
from calrec_jax.text.batches import BatchPlan
from calrec_jax.training import trainable
from calrec_jax.training.train_step import TrainState
from calrec_jax.training.trainable import IsTrained

CHECKED = ('nig', 'tt', 'ut', 'gradient_norm')  # what must be finite in every step


class Meter:
  """Means of metrics, and rates, since the last reading; stops the run where a number is none."""

  def __init__(self, plan: BatchPlan, decoder: DecoderConfig, devices: list[jax.Device]):
    self._plan, self._decoder = plan, decoder
    peaks = [peak_flops(device.device_kind) for device in devices]
    self._peak = sum(peaks) if None not in peaks else None
    self.restart()

  def restart(self) -> None:
    """Begins to count anew; what was added is forgotten."""
    self._time, self._metrics, self._useful = time.monotonic(), {}, 0.0

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self._metrics[step] = metrics
    if self._peak:  # counted now, while the plan of the step is at hand
      self._useful += training_flops(self._decoder, *self._plan.lengths(step))

  def check(self) -> None:
    """Waits for the newest step. Raises UserError for the first step with a loss term or gradient that is NaN or infinite."""
    self._metrics = jax.device_get(self._metrics)
    for step, row in self._metrics.items():
      if wrong := [f'{name} = {float(row[name])}' for name in CHECKED if name in row and not np.isfinite(row[name])]:
        ids = self._plan.example_ids(step)
        raise UserError(f'Step {step + 1}: {", ".join(wrong)}. Its examples: {", ".join(ids[:8])}'
                        f'{f" and {len(ids) - 8} more" if len(ids) > 8 else ""}. Nothing of it is saved: lower LEARNING_RATE '
                        'or optimizer.clip_norm, and go on from the checkpoint before with '
                        '--gin.train.allow_changes=True.')

  def read(self) -> dict[str, float]:
    """Means over the steps since the last reading, and counts a second; waits for the newest step. Raises as `check` does.

    `padding` is the share of positions without a token; `mfu`, where the devices' peak is known, the share of it that useful
    operations take (see `training_flops`).
    """
    self.check()
    rows, seconds = list(self._metrics.values()), time.monotonic() - self._time
    values = {name: float(sum(row[name] for row in rows) / len(rows)) for name in rows[0]}
    for name in ('spans', 'tokens'):
      values[f'{name}_per_second'] = values[name] * len(rows) / seconds
    values['steps_per_second'] = len(rows) / seconds
    values['padding'] = 1 - values['tokens'] / self._plan.shapes.positions
    if self._peak:
      values['mfu'] = self._useful / seconds / self._peak
    self.restart()
    return values


def progress_line(values: dict[str, float], steps_left: int) -> str:
  """What a reading says, in a line."""
  seconds = int(steps_left / values['steps_per_second'])
  left = f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'
  terms = ' '.join(f'{name} {values[name]:.3f}' for name in ('loss', 'nig', 'tt', 'ut'))
  mfu = f', MFU {values["mfu"]:.0%}' if 'mfu' in values else ''
  return (f'{terms}, {values["spans_per_second"]:.0f} spans/s, {values["tokens_per_second"]:.0f} tokens/s, '
          f'padding {values["padding"]:.0%}{mfu}, {left} left')


def count(params: Any) -> int:
  """How many numbers a tree of arrays holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def memory_line(state: TrainState, trained: IsTrained) -> str:
  """What parameters and optimizer state take up on each device, to be read before training begins."""
  def held(tree: Any) -> str:
    sizes = collections.Counter()
    for leaf in jax.tree.leaves(tree):
      if jnp.issubdtype(leaf.dtype, jnp.floating):
        sizes[leaf.dtype.name] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return ' + '.join(f'{size / 1e6:,.1f} MB of {name}' for name, size in sizes.items()) or 'nothing'
  n_devices = len(jax.tree.leaves(state.params)[0].sharding.device_set)
  n_trained = count(trainable.split(state.params, trained)[0])
  average = f'; averaged parameters {held(state.average)}' if state.average is not None else ''
  return (f'{count(state.params):,} parameters, {n_trained:,} of them trained. '
          f'On each of {n_devices} device(s): parameters {held(state.params)}; optimizer state {held(state.opt_state)}'
          f'{average}.')
