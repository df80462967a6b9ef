"""Law 4: any mesh = one device, and two processes = one; with parameters that are seen to be sharded."""

import functools
import json
import pathlib
import pickle
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from calrec_jax.errors import UserError
from calrec_jax.models import head, losses
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.training import partitioning
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import make_train_step, new_state
from calrec_jax.training.trainer import with_vocabulary

TERMS = ('loss', 'nig', 'tt', 'ut', 'spans', 'target_tokens', 'tokens', 'gradient_norm')
TESTS = pathlib.Path(__file__).resolve().parents[1]


def one_step(store: pathlib.Path, shape: tuple[int, int, int], n_devices: int = 8):
  """(metrics, gradients) of one training step on a mesh. The optimizer's only state is the gradient."""
  inputs = tiny.inputs(store)
  mesh = MeshShape(*shape).build(jax.devices()[:n_devices])
  plan = BatchPlan(inputs.corpus(inputs.load(), 'train'), batch_size=8, length=inputs.length, seed=0,
                   options=RowOptions(window_steps=4))
  model = TwoTower(Decoder(with_vocabulary(tiny.DECODER, inputs)), tiny.OBJECTIVE)
  optimizer = optax.trace(0.0)
  make_state, shardings = new_state(model, optimizer, plan.shapes, 0, mesh)
  batch = partitioning.global_batch(functools.partial(plan.batch, 1), 8, partitioning.batch_sharding(mesh))
  state, metrics = make_train_step(model, optimizer, mesh, shardings)(make_state(), batch)
  return metrics, state.opt_state.trace


def named(metrics, gradients) -> dict[str, jax.Array]:
  """Terms and gradients by name."""
  return {term: metrics[term] for term in TERMS} | {
      jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}


def as_numbers(metrics, gradients) -> dict[str, np.ndarray]:
  """Terms and gradients by name, on the host."""
  return {name: np.asarray(leaf) for name, leaf in named(metrics, gradients).items()}


def differing(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
  """The names that are not equal: terms to a relative 1e-5, gradients to 1e-5 of their largest entry."""
  assert found.keys() == expected.keys()
  return [name for name, value in expected.items()
          if not np.allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max())]


def unsharded(gradients, axes: dict[str, int]) -> list[str]:
  """Mesh axes along which no array of the tree is cut into parts of its size."""
  cut = set()
  for leaf in jax.tree.leaves(gradients):
    shard = leaf.addressable_shards[0].data.shape
    for axis, size in axes.items():
      cut |= {axis} if any(whole == size * part and axis in _axes(leaf.sharding.spec, dimension)
                           for dimension, (whole, part) in enumerate(zip(leaf.shape, shard, strict=True))) else set()
  return [axis for axis, size in axes.items() if size > 1 and axis not in cut]


def _axes(spec: P, dimension: int) -> tuple[str, ...]:
  entry = spec[dimension] if dimension < len(spec) else None
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


@pytest.fixture(scope='module')
def one_device(tiny_store):
  return as_numbers(*one_step(tiny_store, (1, 1, 1), n_devices=1))


@pytest.mark.parametrize('shape', [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_any_mesh_is_one_device(tiny_store, one_device, shape):
  metrics, gradients = one_step(tiny_store, shape)
  assert differing(as_numbers(metrics, gradients), one_device) == []
  assert unsharded(gradients, {'fsdp': shape[1], 'model': shape[2]}) == []
  assert all(np.abs(value).max() > 0 for value in one_device.values())


def _per_shard(function, n_sharded: int):
  """`function` on each device's own rows alone: what a loss becomes that forgets the other devices."""
  @functools.wraps(function)
  def call(*arrays, **options):
    if len(arrays[0]) % 8:  # while parameters are drawn, on one small row
      return function(*arrays, **options)
    def own(*arrays):
      value = function(*arrays, **options)
      return value if n_sharded else jax.lax.pmean(value, 'data')
    return jax.shard_map(own, in_specs=P('data'), out_specs=P('data') if n_sharded else P())(*arrays)
  return call


@pytest.mark.parametrize('name, n_sharded, terms', [
    ('weighted_mean', 0, {'loss', 'tt', 'ut'}), ('info_nce', 1, {'loss', 'tt', 'ut'})])
def test_a_loss_over_own_rows_only_is_noticed(tiny_store, one_device, monkeypatch, name, n_sharded, terms):
  monkeypatch.setattr(losses, name, _per_shard(getattr(losses, name), n_sharded))
  found = as_numbers(*one_step(tiny_store, (8, 1, 1)))
  wrong = set(differing(found, one_device))
  assert wrong & {'loss', 'nig', 'tt', 'ut'} == terms
  assert len(wrong) > len(terms) + 3  # gradients too


def test_a_head_that_forgets_the_other_devices_is_noticed(tiny_store, one_device, monkeypatch):
  plain = head._weighted_nll
  first = lambda block, cap, hidden, table, *of_rows: plain(block, cap, hidden[:1], table, *(x[:1] for x in of_rows))
  monkeypatch.setattr(head, '_weighted_nll', first)
  wrong = set(differing(as_numbers(*one_step(tiny_store, (8, 1, 1))), one_device))
  assert wrong & {'loss', 'nig', 'tt', 'ut'} == {'loss', 'nig'} and len(wrong) > 5


@pytest.mark.parametrize('logical, axis', [('embed', 'fsdp'), ('model', 'model')])
def test_a_replicated_parameter_is_noticed(tiny_store, monkeypatch, logical, axis):
  for name in (('embed',) if logical == 'embed' else ('vocab', 'mlp', 'heads', 'kv_heads')):
    monkeypatch.setitem(partitioning.AXIS_RULES, name, None)
  _, gradients = one_step(tiny_store, (2, 2, 2))
  assert unsharded(gradients, {'fsdp': 2, 'model': 2}) == [axis]


def test_the_state_of_an_optimizer_is_sharded_like_its_parameter(tiny_store):
  inputs = tiny.inputs(tiny_store)
  mesh = MeshShape(1, 2, 4).build()
  model = TwoTower(Decoder(with_vocabulary(tiny.DECODER, inputs)), tiny.OBJECTIVE)
  shapes = BatchPlan(inputs.corpus(inputs.load(), 'train'), batch_size=8, length=64, seed=0, options=RowOptions()).shapes
  state = new_state(model, optax.scale_by_adam(), shapes, 0, mesh)[0]()
  same = jax.tree.map(lambda p, m: p.sharding == m.sharding, state.params, state.opt_state.mu)
  assert all(jax.tree.leaves(same))
  assert unsharded(state.params, {'fsdp': 2, 'model': 4}) == []
  embedding = state.params['decoder']['embedding']
  assert embedding.addressable_shards[0].data.shape == (embedding.shape[0] // 4, 16)


CHILD = '''
import json, os, pickle, sys
rank, processes, port, tests, store, model_dir, out = sys.argv[1:]
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={8 // int(processes)}')
sys.path[:0] = [tests, tests + '/training']
import jax
jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=int(processes), process_id=int(rank))
import pathlib
import numpy as np
import test_partitioning, tiny
from calrec_jax.text.batches import BatchPlan
from calrec_jax.training.partitioning import MeshShape
built, batch = set(), BatchPlan.batch
def noted(self, step, rows=slice(None)):
  built.add((rows.start, rows.stop))
  return batch(self, step, rows)
BatchPlan.batch = noted
metrics, gradients = test_partitioning.one_step(pathlib.Path(store), (2, 2, 2))
parts = [(name, leaf.shape, shard.index, np.asarray(shard.data))
         for name, leaf in test_partitioning.named(metrics, gradients).items() for shard in leaf.addressable_shards]
pathlib.Path(f'{out}.{rank}.pickle').write_bytes(pickle.dumps(parts))
validation = None
if processes == '2':
  validation = tiny.train(pathlib.Path(store), pathlib.Path(model_dir), train_steps=2, mesh=MeshShape(2, 2, 2))
pathlib.Path(f'{out}.{rank}.json').write_text(json.dumps({'built': sorted(built), 'validation': validation}))
'''


def in_processes(number: int, store: pathlib.Path, folder: pathlib.Path) -> tuple[dict[str, np.ndarray], list[dict]]:
  """Runs `CHILD` in so many processes: (numbers of a step, each process's report)."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = str(probe.getsockname()[1])
  child, out, ranks = folder / 'child.py', folder / 'numbers', [str(rank) for rank in range(number)]
  child.write_text(CHILD)
  logs = [open(folder / f'log{rank}', 'w') for rank in ranks]
  processes = [subprocess.Popen([sys.executable, child, rank, str(number), port, TESTS, store, folder / 'run', out], stdout=log,
                                stderr=subprocess.STDOUT) for rank, log in zip(ranks, logs, strict=True)]
  try:
    codes = [process.wait(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert codes == [0] * number, '\n'.join((folder / f'log{rank}').read_text()[-3000:] for rank in ranks)
  numbers = {}
  for rank in ranks:  # each has its devices' shards
    for name, shape, index, data in pickle.loads(pathlib.Path(f'{out}.{rank}.pickle').read_bytes()):
      numbers.setdefault(name, np.full(shape, np.nan, np.float32))[index] = data
  return numbers, [json.loads(pathlib.Path(f'{out}.{rank}.json').read_text()) for rank in ranks]


@pytest.mark.slow
def test_two_processes_are_one(tiny_store, one_device, tmp_path):
  numbers, reports = in_processes(2, tiny_store, tmp_path)
  assert differing(numbers, one_device) == []
  # Each process built its own half of the rows, and no other.
  assert [sorted(map(tuple, report['built'])) for report in reports] == [[(0, 2), (2, 4)], [(4, 6), (6, 8)]]
  # A whole run, with its checkpoint, is one process's.
  alone = tiny.train(tiny_store, tmp_path / 'alone', train_steps=2)
  for report in reports:
    assert report['validation'] == pytest.approx(alone, rel=1e-4)
  again = tiny.train(tiny_store, tmp_path / 'run', train_steps=2, mesh=MeshShape(1, 2, 4))  # nothing left but to restore
  assert again == {}


@pytest.mark.slow
def test_four_processes_are_one(tiny_store, one_device, tmp_path):
  numbers, reports = in_processes(4, tiny_store, tmp_path)
  assert differing(numbers, one_device) == []
  assert [report['built'] for report in reports] == [[[0, 2]], [[2, 4]], [[4, 6]], [[6, 8]]]


@pytest.mark.parametrize('shape', [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1), (2, 2, 1), (-2, 1, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_divide_the_devices(shape):
  with pytest.raises(UserError, match='8 devices'):
    MeshShape(*shape).build()


def test_one_axis_takes_what_is_left():
  assert dict(MeshShape(-1, 2, 2).build().shape) == {'data': 2, 'fsdp': 2, 'model': 2}


@pytest.mark.parametrize('batch_size', [0, 4, 12, -8])
def test_rows_that_do_not_divide_over_the_devices(batch_size):
  with pytest.raises(UserError, match='multiple of 8'):
    partitioning.check_batch_size(batch_size, MeshShape().build())


def test_specs_of_arrays():
  mesh = MeshShape(1, 2, 4).build()
  assert partitioning.partition_spec((32, 64), ('embed', 'mlp'), mesh) == P('fsdp', 'model')
  assert partitioning.partition_spec((32, 6), ('embed', 'mlp'), mesh) == P('fsdp', None)  # 4 does not divide 6
  assert partitioning.partition_spec((32,), ('embed', 'mlp'), mesh) == P()  # a factored statistic
  with pytest.raises(ValueError, match='emebd'):
    partitioning.partition_spec((32, 64), ('emebd', 'mlp'), mesh)


def test_a_process_builds_no_rows_twice():
  mesh, asked = MeshShape(2, 2, 2).build(), []
  def build(rows):
    asked.append((rows.start, rows.stop))
    return {'x': np.arange(8, dtype=np.int32)[rows, None]}
  batch = partitioning.global_batch(build, 8, partitioning.batch_sharding(mesh))
  assert sorted(asked) == [(0, 2), (2, 4), (4, 6), (6, 8)]
  np.testing.assert_array_equal(batch['x'], np.arange(8)[:, None])
