"""What crosses devices in a training step: read from the compiled program."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import tiny

from calrec_jax.models import head
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.plan import hlo, traffic
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.training import partitioning
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import make_train_step, new_state
from calrec_jax.training.trainer import with_vocabulary


def step_collectives(store, shape):
  """(collectives of a training step on a mesh, the sizes of its batch, the vocabulary's size)."""
  inputs = tiny.inputs(store)
  mesh, decoder = MeshShape(*shape).build(), with_vocabulary(tiny.DECODER, inputs)
  plan = BatchPlan(inputs.corpus(inputs.load(), 'train'), batch_size=8, length=inputs.length, seed=0,
                   options=RowOptions(window_steps=4))
  model, optimizer = TwoTower(Decoder(decoder), tiny.OBJECTIVE), optax.trace(0.0)
  make_state, shardings = new_state(model, optimizer, plan.shapes, 0, mesh)
  batch = partitioning.global_batch(functools.partial(plan.batch, 1), 8, partitioning.batch_sharding(mesh))
  compiled = make_train_step(model, optimizer, mesh, shardings).lower(jax.eval_shape(make_state), batch).compile()
  return traffic.collectives(hlo.parse(compiled.as_text()), dict(mesh.shape)), plan.shapes, decoder.vocab_size


def holds_logits(found, shapes, vocab_size) -> list:
  """Those that leave a device with scores of all the vocabulary for one of its blocks of target tokens, or more."""
  tokens = min(head.BLOCK, shapes.B * shapes.L // 8)
  return [one for one in found for _, shape in one.arrays if vocab_size in shape and np.prod(shape) >= tokens * vocab_size]


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_no_device_ever_holds_all_logits_of_a_token(tiny_store, shape):
  found, shapes, vocab_size = step_collectives(tiny_store, shape)
  assert found and holds_logits(found, shapes, vocab_size) == []


def test_a_loss_that_gathers_the_logits_is_noticed(tiny_store, monkeypatch):
  monkeypatch.setattr(head, 'softcap', lambda logits, cap: nn.with_logical_constraint(logits, (None, None, None)))
  assert holds_logits(*step_collectives(tiny_store, (1, 2, 4)))


def test_across_data_parallel_devices_go_gradients_and_embeddings_alone(tiny_store):
  found, shapes, _ = step_collectives(tiny_store, (8, 1, 1))
  slots, spans = shapes.B * shapes.S, shapes.B * shapes.E
  width = tiny.DECODER.embed_dim
  gathered = [one for one in found if one.kind == 'all-gather']
  # The texts' embeddings for the spans, and the spans' for the contrast, once each, with some ids: O(global spans x D).
  assert gathered and sum(one.bytes for one in gathered) <= 4 * (slots * width + spans * (width + 8))


def test_with_fsdp_the_weights_are_gathered_and_activations_stay(tiny_store):
  found, shapes, _ = step_collectives(tiny_store, (1, 8, 1))
  in_layers = [one for one in found if one.kind == 'all-gather' and '/layers/' in one.source]
  c = tiny.DECODER
  sizes = {c.embed_dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.ff_dim}
  assert in_layers and all(set(shape) <= sizes for one in in_layers for _, shape in one.arrays)
  rows = {shapes.B * shapes.L, shapes.B * shapes.M}
  assert not any(rows & set(shape) for one in found for _, shape in one.arrays)


def test_constraints_that_are_passed_over_are_noticed(tiny_store, monkeypatch):
  monkeypatch.setattr(nn, 'with_logical_constraint', lambda x, names: x)
  with pytest.raises(AssertionError):
    test_with_fsdp_the_weights_are_gathered_and_activations_stay(tiny_store)
