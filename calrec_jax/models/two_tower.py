"""Two towers, one decoder: a packed batch to v_U, v_T|U, v_T and the loss (method: Towers and losses).

The batch is a dictionary of arrays (`text/batches.py` makes it): the joint part [B, L], the alone part [B, M] and the span
table [B, E]. All means are over the whole batch, whatever the devices it lies on.
"""

from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from calrec_jax.models import losses
from calrec_jax.models.decoder import Decoder

Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class Towers:
  """Embeddings of the batch's spans, float32, not normalised."""

  user_BED: jax.Array  # v_U: mean over the history, up to the target
  context_BED: jax.Array  # v_T|U: mean over the target, read after its history
  target_BED: jax.Array  # v_T: mean over the target, read alone


def pool(hidden_BLD: jax.Array, chosen_BEL: jax.Array) -> jax.Array:
  """Means of the chosen positions, float32 [B, E, D]; zero where nothing is chosen."""
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


def slot_positions(batch: Batch, bos: bool) -> jax.Array:
  """Which alone positions are a slot's text: bool [B, S, M]. Slot s of a row is its segment s + 1; BOS is in none."""
  n_slots = batch['slot_texts'].shape[1]
  slot_BSM = batch['alone_segments'][:, None, :] == jnp.arange(1, n_slots + 1)[None, :, None]
  return slot_BSM & (batch['alone_positions'] >= int(bos))[:, None, :]


def towers(hidden_BLD: jax.Array, alone_BMD: jax.Array, batch: Batch, *, bos: bool) -> Towers:
  """Pools the hidden states of both parts into the embeddings of every span."""
  user_BEL, target_BEL = span_positions(batch, bos)
  slots_BSD = pool(alone_BMD, slot_positions(batch, bos))
  # A span may point to a slot of any row: here the embeddings, and only they, cross the chips.
  slots_SD = nn.with_logical_constraint(slots_BSD.reshape(-1, slots_BSD.shape[-1]), (None, None))
  return Towers(pool(hidden_BLD, user_BEL), pool(hidden_BLD, target_BEL), slots_SD[batch['span_slots']])


def contrastive_losses(towers: Towers, batch: Batch, objective: losses.Objective) -> tuple[jax.Array, jax.Array]:
  """(L_TT, L_UT): means over the spans of the global batch, nats."""
  rows_BE = jnp.broadcast_to(jnp.arange(len(batch['span_texts']))[:, None], batch['span_texts'].shape)
  history_E = (rows_BE * (batch['tokens'].shape[1] + 1) + batch['span_segments']).reshape(-1)
  text_E = batch['span_texts'].reshape(-1)
  flat = lambda x_BED: x_BED.reshape(-1, x_BED.shape[-1])
  def mean(context_BED: jax.Array) -> jax.Array:
    nll_E = losses.info_nce(flat(context_BED), flat(towers.target_BED), text_E, history_E, objective=objective)
    return losses.weighted_mean(nll_E, (text_E > 0).astype(jnp.float32))
  return mean(towers.context_BED), mean(towers.user_BED)


class TwoTower(nn.Module):
  """The training objective over one decoder: parameters are the decoder's alone.

  Attributes:
    decoder: the decoder.
    objective: weights and options of the losses.
    bos: each joint and alone segment opens with a BOS token, which no mean counts.
    head_chunks: the head runs over this many slices of the target positions in turn, so that the logits of one slice
      only are in memory; 1 runs them at once.
  """

  decoder: Decoder
  objective: losses.Objective
  bos: bool = False
  head_chunks: int = 1

  def generation_loss(self, hidden_BLD: jax.Array, batch: Batch) -> jax.Array:
    """L_NIG: nats a target token. The head runs at `loss_positions` [B, Q] only; those past the end are padding."""
    positions_BQ = batch['loss_positions']
    pick = lambda x_BL, fill: jnp.take_along_axis(x_BL, positions_BQ, axis=1, mode='fill', fill_value=fill)
    labels_BQ, weights_BQ = pick(batch['labels'], 0), pick(batch['loss_weights'], 0.0)
    hidden_BQD = jnp.take_along_axis(hidden_BLD, positions_BQ[..., None], axis=1, mode='fill', fill_value=0)
    if self.head_chunks == 1:
      return losses.weighted_mean(losses.token_nll(self.decoder.logits(hidden_BQD), labels_BQ), weights_BQ)
    B, Q = labels_BQ.shape
    pad = -Q % self.head_chunks
    chunk = lambda x: jnp.moveaxis(
        jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).reshape(B, self.head_chunks, -1, *x.shape[2:]), 1, 0)
    def body(decoder: Decoder, total: jax.Array, slices: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
      hidden, labels, weights = slices
      return total + jnp.sum(losses.token_nll(decoder.logits(hidden), labels) * weights), None
    scan = nn.scan(nn.remat(body, prevent_cse=False), variable_broadcast='params', split_rngs={'params': False})
    total, _ = scan(self.decoder, jnp.zeros(()), (chunk(hidden_BQD), chunk(labels_BQ), chunk(weights_BQ)))
    return total / jnp.maximum(jnp.sum(weights_BQ), 1e-9)

  def __call__(self, batch: Batch, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss (a scalar, nats) and its terms, with the counts they are means over."""
    hidden_BLD = self.decoder(batch['tokens'], batch['segments'], batch['positions'], train=train)
    nig = self.generation_loss(hidden_BLD, batch)
    if self.objective.alpha or self.objective.beta:
      alone_BMD = self.decoder(batch['alone_tokens'], batch['alone_segments'], batch['alone_positions'], train=train)
      tt, ut = contrastive_losses(towers(hidden_BLD, alone_BMD, batch, bos=self.bos), batch, self.objective)
    else:
      tt = ut = jnp.zeros(())
    loss = self.objective.total(nig, tt, ut)
    return loss, {
        'loss': loss, 'nig': nig, 'tt': tt, 'ut': ut,
        'spans': jnp.sum(batch['span_texts'] > 0), 'target_tokens': jnp.sum(batch['loss_weights']),
        'tokens': jnp.sum(batch['segments'] > 0) + jnp.sum(batch['alone_segments'] > 0)}

  def embed(self, batch: Batch) -> Towers:
    """The embeddings of the batch's spans."""
    hidden_BLD = self.decoder(batch['tokens'], batch['segments'], batch['positions'])
    alone_BMD = self.decoder(batch['alone_tokens'], batch['alone_segments'], batch['alone_positions'])
    return towers(hidden_BLD, alone_BMD, batch, bos=self.bos)
