"""The optimizer: AdamW or Adafactor, warm-up and decay, gradient clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from calrec_jax.errors import UserError
from calrec_jax.training import rounding


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Options of the update rule.

  Attributes:
    name: `adamw` or `adafactor`.
    learning_rate: peak, per step.
    schedule: what follows the warm-up: `constant`, `linear` or `cosine` (both to `final_fraction` of the peak at the last
      step) or `rsqrt` (falls as 1 / sqrt(step)).
    warmup_steps: steps of linear warm-up, of this stage.
    final_fraction: see `schedule`.
    weight_decay: decoupled, times the learning rate; not on norm scales and biases.
    b1, b2: AdamW's decay rates.
    clip_norm: largest global norm of the gradient; None: not clipped.
    average_decay: the run's parameters are a moving average of the trained ones: a ← d · a + (1 − d) · θ after each step, with
      d the smaller of this and (1 + step) / (10 + step). They are validated, and what other verbs read. 0: not averaged.
    state_dtype: of AdamW's moments and Adafactor's statistics: `float32`, or `bfloat16`, rounded at random without bias.
  """

  name: str = 'adamw'
  learning_rate: float = 1e-3
  schedule: str = 'cosine'
  warmup_steps: int = 100
  final_fraction: float = 0.1
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.99
  clip_norm: float | None = 1.0
  average_decay: float = 0.0
  state_dtype: str = 'float32'

  def __post_init__(self):
    if self.name not in ('adamw', 'adafactor'):
      raise UserError(f"optimizer.name = {self.name!r}: choose 'adamw' or 'adafactor'.")
    if self.schedule not in ('constant', 'linear', 'cosine', 'rsqrt'):
      raise UserError(f"optimizer.schedule = {self.schedule!r}: choose 'constant', 'linear', 'cosine' or 'rsqrt'.")
    if not 0 <= self.average_decay < 1:
      raise UserError(f'optimizer.average_decay = {self.average_decay}: give 0 (not averaged), or a number below 1.')
    if self.state_dtype not in ('float32', 'bfloat16'):
      raise UserError(f"optimizer.state_dtype = {self.state_dtype!r}: choose 'float32' or 'bfloat16'.")

  def rate(self, train_steps: int) -> optax.Schedule:
    """Learning rate of each step, from 0; the last step is `train_steps` − 1."""
    peak, warmup = self.learning_rate, min(self.warmup_steps, train_steps)
    rest = max(train_steps - warmup, 1)
    after = {
        'constant': optax.constant_schedule(peak),
        'linear': optax.linear_schedule(peak, peak * self.final_fraction, rest),
        'cosine': optax.cosine_decay_schedule(peak, rest, self.final_fraction),
        # optax asks for this one during the warm-up too, with steps below 0.
        'rsqrt': lambda step: peak * jnp.sqrt(max(warmup, 1) / (jnp.maximum(step, 0) + max(warmup, 1))),
    }[self.schedule]
    # Step 0 already moves: the warm-up counts from 1.
    return optax.join_schedules([lambda step: peak * (step + 1) / max(warmup, 1), after], [warmup])

  def build(self, train_steps: int) -> optax.GradientTransformation:
    """The transformation of gradients to updates."""
    rate = self.rate(train_steps)
    decayed = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: not {'scale', 'bias'} & {getattr(part, 'key', None) for part in path}, params)
    scale = {
        'adamw': [optax.scale_by_adam(self.b1, self.b2)],
        # Without the scale of the parameters: finetuning starts where they are small on purpose.
        'adafactor': [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)],
    }[self.name]
    clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
    if self.state_dtype == 'bfloat16':
      scale = [rounding.stored_in_bfloat16(optax.chain(*scale))]
    return optax.chain(clip, *scale, optax.add_decayed_weights(self.weight_decay, decayed), optax.scale_by_learning_rate(rate))
