"""Two towers, one decoder: a packed batch to v_U, v_T|U, v_T and the loss (method: Towers and losses).

The batch is a dictionary of arrays (`text/batches.py` makes it): the joint part [B, L], the alone part [B, M] and the span
table [B, E]. All means are over the whole batch, whatever the devices it lies on.
"""

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from calrec_jax.models import head, losses
from calrec_jax.models.decoder import Decoder

Batch = Mapping[str, jax.Array]
Terms = dict[str, jax.Array]


@flax.struct.dataclass
class Pooled:
  """What the rows of a batch embed, each row on its own: float32, not normalised."""

  user_BED: jax.Array  # v_U: mean over the history, up to the target, see `recency`
  context_BED: jax.Array  # v_T|U: mean over the target, read after its history
  slots_BSD: jax.Array  # v_T of each alone slot: mean over a text, read alone


@flax.struct.dataclass
class Towers:
  """Embeddings of the batch's spans, float32, not normalised."""

  user_BED: jax.Array  # v_U
  context_BED: jax.Array  # v_T|U
  target_BED: jax.Array  # v_T, from whichever row it was read in


def pool(hidden_BLD: jax.Array, chosen_BEL: jax.Array) -> jax.Array:
  """Means of the chosen positions, float32 [B, E, D]; zero where nothing is chosen. With weights, the highest is to be 1."""
  chosen_BEL = chosen_BEL.astype(jnp.float32)
  sums_BED = jnp.einsum('bel,bld->bed', chosen_BEL, hidden_BLD.astype(jnp.float32), precision='highest')
  return sums_BED / jnp.maximum(jnp.sum(chosen_BEL, axis=-1), 1.0)[..., None]


def span_positions(batch: Batch, bos: bool) -> tuple[jax.Array, jax.Array]:
  """Which joint positions are a span's history and which its target: two bool [B, E, L]. BOS is in neither."""
  segment_BEL = batch['segments'][:, None, :] == batch['span_segments'][:, :, None]
  target_BEL = segment_BEL & (batch['items'][:, None, :] == batch['span_items'][:, :, None])
  target_BEL &= (batch['span_texts'] > 0)[:, :, None]
  started_BEL = jnp.cumsum(target_BEL, axis=-1) > 0
  text_BL = batch['positions'] >= int(bos)
  return segment_BEL & ~started_BEL & text_BL[:, None, :] & (batch['span_texts'] > 0)[:, :, None], target_BEL


def recency(user_BEL: jax.Array, positions_BL: jax.Array, half_life: float | None) -> jax.Array:
  """Weights of the chosen positions in v_U, float32 [B, E, L]: 1 for the last one, half of it `half_life` tokens before."""
  if half_life is None:
    return user_BEL.astype(jnp.float32)
  positions_BEL = jnp.where(user_BEL, positions_BL[:, None, :], 0)
  ages_BEL = jnp.max(positions_BEL, axis=-1, keepdims=True) - positions_BEL
  return jnp.where(user_BEL, 2.0**(-ages_BEL / half_life), 0.0)


def slot_positions(batch: Batch, bos: bool) -> jax.Array:
  """Which alone positions are a slot's text: bool [B, S, M]. Slot s of a row is its segment s + 1; BOS is in none."""
  n_slots = batch['slot_texts'].shape[1]
  slot_BSM = batch['alone_segments'][:, None, :] == jnp.arange(1, n_slots + 1)[None, :, None]
  return slot_BSM & (batch['alone_positions'] >= int(bos))[:, None, :]


def pooled(hidden_BLD: jax.Array, alone_BMD: jax.Array, batch: Batch, *, bos: bool, half_life: float | None = None) -> Pooled:
  """Pools the hidden states of both parts, row by row."""
  user_BEL, target_BEL = span_positions(batch, bos)
  user_BEL = recency(user_BEL, batch['positions'], half_life)
  return Pooled(pool(hidden_BLD, user_BEL), pool(hidden_BLD, target_BEL), pool(alone_BMD, slot_positions(batch, bos)))


def towers(rows: Pooled, batch: Batch) -> Towers:
  """The embeddings of every span of the global batch."""
  # A span may point to a slot of any row: here the embeddings, and only they, cross the chips.
  slots_SD = nn.with_logical_constraint(rows.slots_BSD.reshape(-1, rows.slots_BSD.shape[-1]), (None, None))
  return Towers(rows.user_BED, rows.context_BED, slots_SD[batch['span_slots']])


def contrast(towers: Towers, batch: Batch, objective: losses.Objective) -> Terms:
  """`tt` and `ut`, L_TT and L_UT in nats; `tt_accuracy` and `ut_accuracy`, the share of spans whose own target is the nearest.

  All are means over the spans of the global batch.
  """
  rows_BE = jnp.broadcast_to(jnp.arange(len(batch['span_texts']))[:, None], batch['span_texts'].shape)
  history_E = (rows_BE * (batch['tokens'].shape[1] + 1) + batch['span_segments']).reshape(-1)
  text_E = batch['span_texts'].reshape(-1)
  log_shares_E = batch['span_log_shares'].reshape(-1)
  used_E = (text_E > 0).astype(jnp.float32)
  flat = lambda x_BED: x_BED.reshape(-1, x_BED.shape[-1])
  target_ED = nn.with_logical_constraint(flat(towers.target_BED), (None, None))  # gathered once, for all that follows
  terms = {}
  for name, context_BED in (('tt', towers.context_BED), ('ut', towers.user_BED)):
    spans = flat(context_BED), target_ED, text_E, history_E
    terms[name] = losses.weighted_mean(losses.info_nce(*spans, log_shares_E, objective=objective), used_E)
    nearest_E = losses.own_is_nearest(*spans, objective=objective).astype(jnp.float32)
    terms[f'{name}_accuracy'] = losses.weighted_mean(nearest_E, used_E)
  return terms


def no_contrast() -> Terms:
  """The terms where both contrastive losses have no weight: nothing is read alone."""
  return dict.fromkeys(('tt', 'tt_accuracy', 'ut', 'ut_accuracy'), jnp.zeros(()))


def mean_nll(nll: jax.Array, batch: Batch) -> jax.Array:
  """L_NIG: nats of target tokens, added up, over the target tokens of the batch."""
  return nll / jnp.maximum(jnp.sum(batch['loss_weights']), 1e-9)


def summary(nll: jax.Array, contrastive: Terms, batch: Batch, objective: losses.Objective) -> tuple[jax.Array, Terms]:
  """The loss (a scalar, nats), and its terms with the counts they are means over.

  Args:
    nll: nats of all target tokens, added up.
    contrastive: what `contrast` returns.
    batch: the global batch.
    objective: weights of the terms.
  """
  nig = mean_nll(nll, batch)
  loss = objective.total(nig, contrastive['tt'], contrastive['ut'])
  return loss, {
      'loss': loss, 'nig': nig, **contrastive,
      'spans': jnp.sum(batch['span_texts'] > 0), 'target_tokens': jnp.sum(batch['loss_weights']),
      'tokens': jnp.sum(batch['segments'] > 0) + jnp.sum(batch['alone_segments'] > 0)}


class TwoTower(nn.Module):
  """The training objective over one decoder: parameters are the decoder's alone.

  Attributes:
    decoder: the decoder.
    objective: weights and options of the losses.
    bos: each joint and alone segment opens with a BOS token, which no mean counts.
    head_block: target positions of a device at which the head runs at once: their logits are in memory.
    longest_history, longest_text: most tokens of a joint and of an alone segment, see `Decoder`; None: unknown.
  """

  decoder: Decoder
  objective: losses.Objective
  bos: bool = False
  head_block: int = head.BLOCK
  longest_history: int | None = None
  longest_text: int | None = None

  def joint(self, batch: Batch, train: bool = False) -> jax.Array:
    """Hidden states of the histories, [B, L, D]."""
    return self.decoder(batch['tokens'], batch['segments'], batch['positions'], longest=self.longest_history, train=train)

  def alone(self, batch: Batch, train: bool = False) -> jax.Array:
    """Hidden states of the item texts, [B, M, D]."""
    return self.decoder(batch['alone_tokens'], batch['alone_segments'], batch['alone_positions'], longest=self.longest_text,
                        train=train)

  def target_nll(self, hidden_BLD: jax.Array, batch: Batch) -> jax.Array:
    """−log p of all target tokens and item ends of the batch, added up: float32, nats."""
    return self.decoder.weighted_nll(hidden_BLD, batch['labels'], batch['loss_weights'], block=self.head_block)

  def __call__(self, batch: Batch, *, train: bool = False) -> tuple[jax.Array, Terms]:
    """The loss (a scalar, nats) and its terms, with the counts they are means over."""
    nll, rows = self.rows(batch, train=train)
    terms = no_contrast() if rows is None else contrast(towers(rows, batch), batch, self.objective)
    return summary(nll, terms, batch, self.objective)

  def embed_rows(self, batch: Batch, *, train: bool = False) -> Pooled:
    """What the rows embed; the head does not run."""
    return self._pooled(self.joint(batch, train), batch, train)

  def rows(self, batch: Batch, *, train: bool = False, embeds: bool | None = None) -> tuple[jax.Array, Pooled | None]:
    """The target tokens' nats, added up, and what the rows embed: None, if nothing is contrasted and `embeds` is."""
    hidden_BLD = self.joint(batch, train)
    nll = self.target_nll(hidden_BLD, batch)
    if not (self.objective.contrasts if embeds is None else embeds):
      return nll, None
    return nll, self._pooled(hidden_BLD, batch, train)

  def _pooled(self, hidden_BLD: jax.Array, batch: Batch, train: bool) -> Pooled:
    return pooled(hidden_BLD, self.alone(batch, train), batch, bos=self.bos, half_life=self.decoder.config.user_half_life)

  def validate(self, batch: Batch) -> tuple[Terms, jax.Array]:
    """The terms of the loss, without dropout, and v_U of the spans, float32 [B, E, D]."""
    nll, rows = self.rows(batch, embeds=True)
    terms = contrast(towers(rows, batch), batch, self.objective) if self.objective.contrasts else no_contrast()
    return summary(nll, terms, batch, self.objective)[1], rows.user_BED

  def embed_texts(self, batch: Batch) -> jax.Array:
    """v_T of each alone slot, float32 [B, S, D]."""
    return pool(self.alone(batch), slot_positions(batch, self.bos))

  def embed(self, batch: Batch) -> Towers:
    """The embeddings of the batch's spans."""
    return towers(self.embed_rows(batch), batch)
