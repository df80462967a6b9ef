"""The losses of CALRec: next-item generation and two contrastive alignments (method: Towers and losses)."""

import dataclasses

import jax
import jax.numpy as jnp

from calrec_jax.errors import UserError

DIRECTIONS = ('context_to_target', 'target_to_context', 'symmetric')


@dataclasses.dataclass(frozen=True)
class Objective:
  """L = (1 − α − β) · L_NIG + α · L_TT + β · L_UT.

  Attributes:
    alpha: weight of L_TT, the alignment of the target in context with the target alone.
    beta: weight of L_UT, the alignment of the history with the target alone.
    temperature: τ of the softmax over cosines.
    direction: `context_to_target` (the negatives of a context are the other targets), `target_to_context` (those of a
      target are the other contexts) or `symmetric` (the mean of both). The paper does not say; the first is our default.
    mask_same_text: spans whose targets have one text are not each other's negatives.
    mask_same_history: neither are spans of one history.
    sampling_correction: c from 0 to 1. A batch holds an item's text as often as it is bought, so the softmax over the batch
      learns how much more than that a context makes it probable. With c times the log of the text's share of all targets off
      each logit (Yi et al. 2019), cosine / τ + (1 − c) · log share learns to be the text's log-probability, up to a constant
      of the context, as in a softmax over the whole catalogue; that of c = 1 is in the cosine alone.
  """

  alpha: float = 0.125
  beta: float = 0.025
  temperature: float = 0.5
  direction: str = 'context_to_target'
  mask_same_text: bool = True
  mask_same_history: bool = False
  sampling_correction: float = 0.0

  def __post_init__(self):
    if min(self.alpha, self.beta) < 0 or self.alpha + self.beta > 1:
      raise UserError(f'objective.alpha = {self.alpha}, objective.beta = {self.beta}: both at least 0, their sum at most 1.')
    if self.temperature <= 0:
      raise UserError(f'objective.temperature = {self.temperature}: must be above 0.')
    if not 0 <= self.sampling_correction <= 1:
      raise UserError(f'objective.sampling_correction = {self.sampling_correction}: from 0 (none) to 1 (whole).')
    if self.direction not in DIRECTIONS:
      raise UserError(f'objective.direction = {self.direction!r}: choose one of {DIRECTIONS}.')

  @property
  def contrasts(self) -> bool:
    """Whether a contrastive loss has any weight."""
    return bool(self.alpha or self.beta)

  def total(self, nig: jax.Array, tt: jax.Array, ut: jax.Array) -> jax.Array:
    return (1 - self.alpha - self.beta) * nig + self.alpha * tt + self.beta * ut


def unit(x_ED: jax.Array) -> jax.Array:
  """Vectors of length one, float32. A zero vector stays zero, with a gradient of zero."""
  x_ED = x_ED.astype(jnp.float32)
  squares_E1 = jnp.sum(jnp.square(x_ED), axis=-1, keepdims=True)
  is_zero_E1 = squares_E1 < 1e-12
  return jnp.where(is_zero_E1, 0.0, x_ED * jax.lax.rsqrt(jnp.where(is_zero_E1, 1.0, squares_E1)))


def contrast_logits(context_ED: jax.Array, target_ED: jax.Array, text_E: jax.Array, history_E: jax.Array,
                    log_shares_E: jax.Array | None = None, *, objective: Objective) -> jax.Array:
  """cosine / τ of each span's context (rows) with each one's target: float32 [E, E]; −inf where a span is no negative.

  Args:
    context_ED: v_U or v_T|U of each span.
    target_ED: v_T of each span.
    text_E: identity of the target's text; 0 marks an empty slot, which is nobody's negative.
    history_E: identity of the span's history in the batch.
    log_shares_E: log of the share of all targets that have the span's text; needed with `sampling_correction` only.
    objective: temperature, what is masked, and whether sampling is corrected for.
  """
  cosine_EE = jnp.einsum('ed,fd->ef', unit(context_ED), unit(target_ED), precision='highest')
  one_EE = jnp.eye(len(text_E), dtype=bool)
  used_E = text_E > 0
  excluded_EE = ~(used_E[:, None] & used_E[None, :])
  if objective.mask_same_text:
    excluded_EE |= text_E[:, None] == text_E[None, :]
  if objective.mask_same_history:
    excluded_EE |= history_E[:, None] == history_E[None, :]
  logits_EE = cosine_EE / objective.temperature
  if objective.sampling_correction:
    logits_EE -= objective.sampling_correction * log_shares_E[None, :]
  return jnp.where(excluded_EE & ~one_EE, -jnp.inf, logits_EE)


def _own(x_EE: jax.Array) -> jax.Array:
  """The diagonal, as sums over rows: with rows over several devices, `jnp.diagonal` would send ids and values across them."""
  return jnp.sum(jnp.where(jnp.eye(len(x_EE), dtype=bool), x_EE, 0.0), axis=1)


def info_nce(context_ED: jax.Array, target_ED: jax.Array, text_E: jax.Array, history_E: jax.Array,
             log_shares_E: jax.Array | None = None, *, objective: Objective) -> jax.Array:
  """InfoNCE of each span's context with its target, against the other spans': float32 [E], nats a span.

  Arguments are those of `contrast_logits`; an empty slot costs nothing.
  """
  logits_EE = contrast_logits(context_ED, target_ED, text_E, history_E, log_shares_E, objective=objective)
  to_target_E = -_own(jax.nn.log_softmax(logits_EE, axis=1))
  to_context_E = -_own(jax.nn.log_softmax(logits_EE, axis=0))
  return {'context_to_target': to_target_E, 'target_to_context': to_context_E,
          'symmetric': (to_target_E + to_context_E) / 2}[objective.direction]


def own_is_nearest(context_ED: jax.Array, target_ED: jax.Array, text_E: jax.Array, history_E: jax.Array, *,
                   objective: Objective) -> jax.Array:
  """Whether a context is nearer to its own target than to all of its negatives: bool [E]; a tie is a miss."""
  plain = dataclasses.replace(objective, sampling_correction=0.0)
  logits_EE = contrast_logits(context_ED, target_ED, text_E, history_E, objective=plain)
  others_EE = jnp.where(jnp.eye(len(text_E), dtype=bool), -jnp.inf, logits_EE)
  return _own(logits_EE) > jnp.max(others_EE, axis=1)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Σ w x / Σ w over the whole array, which is the global batch; 0 where all weights are 0."""
  return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-9)
