"""The programs of a run, ready to be compiled for devices that need not be there: a training step, prefill, a decoding step.

Nothing is allocated: parameters, optimizer state and batch are shapes with shardings.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from calrec_jax.errors import UserError
from calrec_jax.inference import sampling
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder, abstract_params
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import RowOptions
from calrec_jax.text.rows import Shapes
from calrec_jax.training import partitioning, trainable
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.train_step import make_train_step, new_state

# What a batch is taken to be like, where only the data can tell.
ITEM_TOKENS = 32  # of an item's text, its prompt included
HISTORY_TOKENS = 256
FILL = 0.9  # the share of positions that hold tokens


@dataclasses.dataclass(frozen=True)
class Training:
  """What of a training run's settings its program depends on; see `trainer.train` for each."""

  decoder: DecoderConfig
  objective: Objective
  rows: RowOptions
  optimizer: Optimizer
  lengths: Mapping[str, int]
  batch_size: int
  microbatches: int
  head_block: int
  frozen: Sequence[str]

  @property
  def spans(self) -> float:
    """Of a row: its targets."""
    length = self.rows.tokens(sum(self.lengths.values()))
    histories = FILL * length / HISTORY_TOKENS
    return histories if self.rows.targets == 'last' else FILL * length / ITEM_TOKENS - histories

  @property
  def shapes(self) -> Shapes:
    """Of a batch: as set, or as `ITEM_TOKENS` and `HISTORY_TOKENS` have it."""
    length = self.rows.tokens(sum(self.lengths.values()))
    spans = self.rows.spans_per_row or 4 * math.ceil(self.spans / FILL / 4)
    slots = self.rows.alone_slots or spans
    alone = self.rows.alone_length or 8 * math.ceil(slots * ITEM_TOKENS / 8)
    return Shapes(B=self.batch_size, L=length, M=alone, E=spans, S=slots)

  @property
  def tokens(self) -> float:
    """Read in a step, joint and alone."""
    return self.batch_size * (FILL * self.shapes.L + self.spans * ITEM_TOKENS)

  @property
  def target_tokens(self) -> float:
    """Of a step."""
    return self.batch_size * self.spans * ITEM_TOKENS

  @property
  def segments(self) -> np.ndarray:
    """Tokens of each segment that a step reads."""
    histories = max(round(self.batch_size * FILL * self.shapes.L / HISTORY_TOKENS), 1)
    return np.concatenate([np.full(histories, self.batch_size * FILL * self.shapes.L / histories),
                           np.full(round(self.batch_size * self.spans), ITEM_TOKENS)])


def for_tpu(config: DecoderConfig) -> DecoderConfig:
  """What `auto` means on a TPU. Raises UserError without a vocabulary size."""
  if config.vocab_size is None:
    raise UserError('decoder.vocab_size is left to the vocabulary, which is not read here; add --gin.decoder.vocab_size=N.')
  changes = {'dtype': 'bfloat16', 'attention': 'splash'}
  return dataclasses.replace(config, **{name: value for name, value in changes.items() if getattr(config, name) == 'auto'})


@dataclasses.dataclass(frozen=True)
class Traced:
  """A program that can be compiled, and the bytes that each of its devices holds before it begins, by what they are."""

  traced: Any
  held: dict[str, int]


def train_step(training: Training, mesh: Mesh) -> Traced:
  """The training step of the trainer, on a mesh. Raises UserError for a batch that the mesh does not divide."""
  partitioning.check_batch_size(training.batch_size, mesh, training.microbatches)
  config, shapes = for_tpu(training.decoder), training.shapes
  trained = trainable.is_trained(config, training.frozen)
  model = TwoTower(Decoder(config), training.objective, head_block=training.head_block,
                   longest_history=sum(training.lengths.values()), longest_text=training.lengths['targets'])
  optimizer = training.optimizer.build(train_steps=10_000)
  make_state, shardings = new_state(model, optimizer, shapes, 0, mesh, trained, averages=training.optimizer.average_decay > 0)
  placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(placed, jax.eval_shape(make_state), shardings)
  rows = partitioning.batch_sharding(mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.features().items()}
  step = make_train_step(model, optimizer, mesh, shardings, trained, training.microbatches, training.optimizer.average_decay)
  held = {'parameters': bytes_of(state.params), 'optimizer': bytes_of(state.opt_state) + bytes_of(state.average),
          'batch': bytes_of(batch)}
  return Traced(step.trace(state, batch), held)


def bytes_of(tree: Any) -> int:
  """That one device holds of a tree of shapes with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Inference:
  """What of inference its programs depend on; see `inference.generate`.

  Attributes:
    users: that are read together.
    samples: texts of each.
    prefix: tokens of a history.
    text: most tokens of a text.
  """

  users: int
  samples: int
  prefix: int
  text: int


def prefill_and_decode(config: DecoderConfig, inference: Inference, device: Any) -> dict[str, Traced]:
  """The two programs of sampling, on one device: as many hosts as there are each run them for users of their own."""
  config = for_tpu(config)
  decoder, mesh = Decoder(config), Mesh(np.asarray([device]), ('data',))
  where = NamedSharding(mesh, P())
  place = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where))
  params = place(jax.eval_shape(lambda: decoding.by_layer(jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(config)))))
  ints = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=where)
  U, B = inference.users, inference.users * inference.samples
  prefill = functools.partial(decoding.prefill, decoder, bos=True, half_life=config.user_half_life)
  prefix = place(jax.eval_shape(prefill, params, ints(U, inference.prefix), ints(U)))
  suffix = place(jax.eval_shape(lambda: decoding.empty_suffix(decoder, B, inference.text - 1)))
  of = decoding.Branches(ints(U, inference.samples), ints(B))
  weights = {'parameters': bytes_of(params)}
  caches = {'prefix caches': bytes_of(prefix.caches), 'suffix caches': bytes_of(suffix)}
  step = sampling.read_tokens.trace(decoder, params, ints(B), prefix, suffix, of, ints())
  return {'prefill': Traced(jax.jit(prefill).trace(params, ints(U, inference.prefix), ints(U)), weights),
          'decode': Traced(step, weights | caches)}
