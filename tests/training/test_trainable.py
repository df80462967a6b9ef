"""What is trained moves, what is frozen stays bit by bit; runs with factors, and in bfloat16, are runs like others."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from flax import traverse_util

from calrec_jax.errors import UserError
from calrec_jax.inference.loading import load
from calrec_jax.models import lora
from calrec_jax.models.decoder import abstract_params
from calrec_jax.training import checkpoints, trainable
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape

LORA = dataclasses.replace(tiny.DECODER, lora_rank=2)
PRETRAINED = {'name': 'base', 'license': 'mit'}


def weights(model_dir, config=tiny.DECODER, step=None):
  """Path to array of a checkpoint's parameters, factors included."""
  found = checkpoints.find(model_dir if step is None else model_dir / 'checkpoints' / str(step))
  config = found.decoder_config(param_dtype=config.param_dtype)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), abstract_params(config))
  return traverse_util.flatten_dict(jax.device_get(checkpoints.load(found, params={'decoder': shapes})['params']['decoder']))


@pytest.fixture(scope='module')
def full(tiny_store, tmp_path_factory):
  """A run of stage I, all weights trained; its description says that it began with a pretrained model."""
  folder = tmp_path_factory.mktemp('full') / 'run'
  tiny.train(tiny_store, folder, train_steps=2)
  found = checkpoints.find(folder)
  (found.folder / 'description/metadata').write_text(json.dumps(found.description | {'pretrained': PRETRAINED}))
  return folder


def optimizer_leaves(model_dir):
  found = checkpoints.find(model_dir)
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.metadata(found.folder / 'rest').item_metadata.tree
  return [leaf for leaf in jax.tree.leaves(tree['opt_state']) if leaf.shape]


def test_with_factors_only_they_move_and_only_they_have_an_optimizer_state(tiny_store, full, tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    tiny.train(tiny_store, tmp_path / 'run', decoder=LORA, initial_checkpoint=str(full), train_steps=3,
               optimizer=Optimizer(warmup_steps=1, learning_rate=1e-2))
  before, after = weights(full), weights(tmp_path / 'run')
  factors = {path for path in after if path[-1] in lora.FACTORS}
  assert factors and after.keys() == before.keys() | factors
  for path, leaf in before.items():
    np.testing.assert_array_equal(after[path], leaf)
  assert all(np.abs(after[path]).max() > 0 for path in factors)
  n_trained = sum(after[path].size for path in factors)
  assert sum(np.prod(leaf.shape) for leaf in optimizer_leaves(tmp_path / 'run')) == 2 * n_trained
  line = next(message for message in caplog.messages if 'of them trained' in message)
  n = sum(leaf.size for leaf in after.values())
  assert f'{n:,} parameters, {n_trained:,} of them trained' in line
  assert f'parameters {4 * n / 1e6:,.1f} MB of float32; optimizer state {8 * n_trained / 1e6:,.1f} MB of float32' in line
  assert json.loads((tmp_path / 'run/run.json').read_text())['memory'] == line


@pytest.fixture(scope='module')
def low_rank(tiny_store, full, tmp_path_factory):
  """A run of factors on top of `full`."""
  folder = tmp_path_factory.mktemp('low_rank') / 'run'
  tiny.train(tiny_store, folder, decoder=LORA, initial_checkpoint=str(full), train_steps=4)
  return folder


def test_a_resumed_run_of_factors_is_the_uninterrupted_one(tiny_store, full, low_rank, tmp_path):
  shutil.copytree(low_rank, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run/checkpoints/4')
  tiny.train(tiny_store, tmp_path / 'run', decoder=LORA, initial_checkpoint=str(full), train_steps=4)
  expected = weights(low_rank)
  for path, leaf in weights(tmp_path / 'run').items():
    np.testing.assert_array_equal(leaf, expected[path])
  for run in (low_rank, tmp_path / 'run'):  # begun from `full`, and gone on with: both know the model at the root
    assert checkpoints.find(run).description['pretrained'] == PRETRAINED


def starts_as(tiny_store, folder, initial, decoder):
  """The weights of a run's first checkpoint when nothing was learned."""
  tiny.train(tiny_store, folder, decoder=decoder, initial_checkpoint=str(initial), train_steps=1,
             optimizer=Optimizer(learning_rate=0.0))
  return weights(folder)


def test_factors_are_trained_on_or_merged_into_what_comes_next(tiny_store, low_rank, tmp_path):
  theirs = weights(low_rank)
  for name, decoder in (('same', LORA), ('recent', dataclasses.replace(LORA, user_half_life=8.0))):
    same = starts_as(tiny_store, tmp_path / name, low_rank, decoder)
    for path, leaf in theirs.items():
      np.testing.assert_array_equal(same[path], leaf)
  merged = traverse_util.flatten_dict(load(low_rank).params)
  assert np.abs(merged['layers', 'mlp', 'up', 'kernel'] - theirs['layers', 'mlp', 'up', 'kernel']).max() > 0
  for name, decoder in (('full', tiny.DECODER), ('other', dataclasses.replace(LORA, lora_rank=3))):
    begun = starts_as(tiny_store, tmp_path / name, low_rank, decoder)
    for path, leaf in merged.items():
      np.testing.assert_allclose(begun[path], leaf, rtol=1e-6)
    assert all(not begun[path].any() for path in begun if path[-1] == 'lora_b')


@pytest.mark.parametrize('decoder', [tiny.DECODER, LORA], ids=['all', 'factors'])
def test_frozen_parameters_stay_bit_by_bit_on_any_mesh(tiny_store, full, tmp_path, decoder):
  runs = []
  for mesh in (MeshShape(8, 1, 1), MeshShape(2, 2, 2)):
    runs.append(tmp_path / str(mesh.data))
    tiny.train(tiny_store, runs[-1], decoder=decoder, frozen=('embedding', 'mlp'), initial_checkpoint=str(full), train_steps=2,
               mesh=mesh)
  before, (first, second) = weights(full), map(weights, runs)
  for path, leaf in first.items():
    np.testing.assert_allclose(leaf, second[path], atol=1e-5 * max(np.abs(leaf).max(), 1))
    frozen = path[0] == 'embedding' or 'mlp' in path or (decoder == LORA and path[-1] not in lora.FACTORS)
    if path in before:
      assert np.array_equal(leaf, before[path]) == np.array_equal(second[path], before[path]) == frozen, path
    elif path[-1] == 'lora_b':
      assert leaf.any() == second[path].any() == (not frozen), path


@pytest.mark.parametrize('frozen, message', [('embedding', r"is one text; write a list of names, \['embedding'\]"),
                                             (('embeddings',), "no parameter is called 'embeddings'; there are attention, "),
                                             (('layers', 'embedding', 'final_norm'), 'nothing is left to train')])
def test_names_that_freeze_nothing_or_all_are_refused(tiny_store, tmp_path, frozen, message):
  with pytest.raises(UserError, match=message):
    trainable.is_trained(dataclasses.replace(tiny.DECODER, vocab_size=8), frozen)


@pytest.mark.parametrize('change', [{'decoder': LORA}, {'frozen': ('embedding',)}])
def test_a_run_is_not_resumed_with_other_trained_parameters(tiny_store, full, change):
  with pytest.raises(UserError, match='was begun with other (decoder|frozen)'):
    tiny.train(tiny_store, full, train_steps=3, **change)


def test_bfloat16_parameters_and_state_train_as_float32_ones_and_resume(tiny_store, full, tmp_path):
  half = {'initial_checkpoint': str(full), 'decoder': dataclasses.replace(tiny.DECODER, param_dtype='bfloat16'),
          'optimizer': Optimizer(warmup_steps=2, state_dtype='bfloat16')}
  tiny.train(tiny_store, tmp_path / 'half', train_steps=6, **half)
  tiny.train(tiny_store, tmp_path / 'exact', train_steps=6, optimizer=Optimizer(warmup_steps=2), initial_checkpoint=str(full))
  losses = [tiny.scalars(tmp_path / name, 'train/loss') for name in ('half', 'exact')]
  np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=0.02)
  assert {leaf.dtype for leaf in optimizer_leaves(tmp_path / 'half')} == {jnp.dtype(jnp.bfloat16)}
  assert checkpoints.stored_dtype(checkpoints.find(tmp_path / 'half')) == 'bfloat16'
  expected = weights(tmp_path / 'half', half['decoder'])
  shutil.rmtree(tmp_path / 'half/checkpoints/6')
  tiny.train(tiny_store, tmp_path / 'half', train_steps=6, **half)
  for path, leaf in weights(tmp_path / 'half', half['decoder']).items():
    np.testing.assert_array_equal(leaf, expected[path])


def test_parameters_and_optimizer_state_have_types_of_their_own(tiny_store, full, tmp_path):
  for name, param_dtype, state_dtype in (('a', 'bfloat16', 'float32'), ('b', 'float32', 'bfloat16')):
    tiny.train(tiny_store, tmp_path / name, train_steps=2, initial_checkpoint=str(full), frozen=('layers',),
               decoder=dataclasses.replace(tiny.DECODER, param_dtype=param_dtype), optimizer=Optimizer(state_dtype=state_dtype))
    assert {str(leaf.dtype) for leaf in optimizer_leaves(tmp_path / name)} == {state_dtype}
    assert checkpoints.stored_dtype(checkpoints.find(tmp_path / name)) == param_dtype


def test_split_and_join_are_inverse():
  params = {'a': {'kernel': 1, 'lora_a': 2}, 'b': 3}
  trained, fixed = trainable.split(params, lambda path: path[-1] == 'lora_a')
  assert (trained, fixed) == ({'a': {'lora_a': 2}}, {'a': {'kernel': 1}, 'b': 3})
  assert trainable.join(fixed, trained) == params and trainable.join(params, {'b': 4})['b'] == 4
