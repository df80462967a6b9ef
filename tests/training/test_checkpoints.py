"""Checkpoints: stage II starts from stage I's arrays; what does not fit, or is not whole, is told in one line."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from calrec_jax.errors import UserError
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary
from calrec_jax.training import checkpoints
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.trainer import Schedule

STILL = Optimizer(learning_rate=0.0, weight_decay=0.0)


def saved_params(model_dir: pathlib.Path) -> dict[str, np.ndarray]:
  found = checkpoints.find(model_dir)
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(found.folder / 'params')
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope='module')
def stage1(tiny_store, tmp_path_factory) -> pathlib.Path:
  """A run of two steps. Tests read it, or damage a copy."""
  model_dir = tmp_path_factory.mktemp('stage1') / 'run'
  tiny.train(tiny_store, model_dir, train_steps=2, schedule=Schedule(eval_every=0, save_every=1))
  return model_dir


@pytest.fixture
def copy(stage1, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(stage1, tmp_path / 'copy'))


def stage2(store, model_dir, initial, **changes):
  return tiny.train(store, model_dir, **{'train_steps': 1, 'inputs': tiny.inputs(store, 'games'), 'optimizer': STILL,
                                         'initial_checkpoint': str(initial)} | changes)


def test_stage2_starts_from_exactly_the_arrays_of_stage1(tiny_store, stage1, tmp_path):
  stage2(tiny_store, tmp_path / 'stage2', stage1, seed=1)
  there, here = saved_params(stage1), saved_params(tmp_path / 'stage2')
  assert there.keys() == here.keys()
  assert [name for name in there if there[name].tobytes() != here[name].tobytes()] == []
  assert checkpoints.find(tmp_path / 'stage2').step == 1  # its own steps
  tiny.train(tiny_store, tmp_path / 'new', train_steps=1, inputs=tiny.inputs(tiny_store, 'games'), optimizer=STILL, seed=1)
  assert saved_params(tmp_path / 'new')[next(iter(there))].tobytes() != there[next(iter(there))].tobytes()


def test_a_step_may_be_named(tiny_store, stage1, tmp_path):
  assert checkpoints.find(stage1).step == 2
  first = stage1 / 'checkpoints' / '1'
  assert (checkpoints.find(first).step, checkpoints.find(first).model_dir) == (1, stage1)
  stage2(tiny_store, tmp_path / 'stage2', first)
  with ocp.StandardCheckpointer() as checkpointer:
    expected = checkpointer.restore(first / 'params')['decoder']['embedding']
  np.testing.assert_array_equal(saved_params(tmp_path / 'stage2')["['decoder']['embedding']"], expected)


def other_vocabulary():
  return train_vocabulary(['quite another catalogue'], size=300, phrases=template_phrases(ItemTemplate()))


MISFITS = {
    'n_layers is 2 there, 3 here': lambda store: {'decoder': dataclasses.replace(tiny.DECODER, n_layers=3)},
    'vocab_size is 384 there, 512 here': lambda store: {'decoder': dataclasses.replace(tiny.DECODER, vocab_size=512)},
    'rope_base': lambda store: {'decoder': dataclasses.replace(tiny.DECODER, rope_base=5.0)},
    'another vocabulary': lambda store: {'inputs': tiny.inputs(store, 'games', vocabulary=other_vocabulary())},
    'other item texts': lambda store: {'inputs': tiny.inputs(store, 'games', template=ItemTemplate(unknown='skip'))}}


@pytest.mark.parametrize('message', MISFITS)
@pytest.mark.parametrize('how', ['initial', 'resumed'])
def test_a_checkpoint_that_does_not_fit(tiny_store, stage1, copy, tmp_path, message, how):
  changes, out = MISFITS[message](tiny_store), tmp_path / 'out'
  before = contents(copy)
  with pytest.raises(UserError, match=message) as raised:
    if how == 'initial':
      stage2(tiny_store, out, copy, **changes)
    else:
      tiny.train(tiny_store, copy, train_steps=4, **changes)
  assert str(copy / 'checkpoints' / '2') in str(raised.value) and '\n' not in str(raised.value)
  assert not out.exists() and contents(copy) == before


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('changes, message', [
    (lambda store: {'inputs': tiny.inputs(store, 'games')}, 'begun with other data'),
    (lambda store: {'optimizer': Optimizer(name='adafactor')}, 'begun with other optimizer')])
def test_a_run_is_not_resumed_with_other_data_or_another_optimizer(tiny_store, copy, changes, message):
  before = contents(copy)
  with pytest.raises(UserError, match=message):
    tiny.train(tiny_store, copy, train_steps=4, **changes(tiny_store))
  assert contents(copy) == before


def cut_description(step: pathlib.Path) -> None:
  path = step / 'description' / 'metadata'
  path.write_bytes(path.read_bytes()[:-40])


def cut_arrays(step: pathlib.Path) -> None:
  for path in (step / 'params').rglob('d/*'):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def lose_arrays(step: pathlib.Path) -> None:
  for path in (step / 'params').rglob('d/*'):
    path.unlink()


@pytest.mark.parametrize('damage', [
    cut_description, cut_arrays, lose_arrays,
    lambda step: shutil.rmtree(step / 'params'),
    lambda step: shutil.rmtree(step / 'description'),
    lambda step: [shutil.rmtree(path) for path in step.iterdir() if path.is_dir()]],
    ids=['cut description', 'cut arrays', 'lost arrays', 'no params', 'no description', 'empty'])
def test_a_damaged_checkpoint_is_named(tiny_store, copy, tmp_path, damage):
  step = copy / 'checkpoints' / '2'
  damage(step)
  with pytest.raises(UserError, match='remove this step to use step 1') as raised:
    stage2(tiny_store, tmp_path / 'out', copy)
  assert str(step) in str(raised.value) and '\n' not in str(raised.value)
  assert not (tmp_path / 'out').exists()
  # What the message says helps.
  shutil.rmtree(step)
  assert checkpoints.find(copy).step == 1


def test_a_run_with_a_damaged_checkpoint_does_not_start_anew(tiny_store, copy):
  cut_arrays(copy / 'checkpoints' / '2')
  with pytest.raises(UserError, match='checkpoints/2.*remove this step to use step 1'):
    tiny.train(tiny_store, copy, train_steps=4, allow_changes=True)


def test_a_half_written_step_is_not_seen(copy):
  steps = copy / 'checkpoints'
  (steps / '2').rename(steps / '2.orbax-checkpoint-tmp')  # the name until all is on disk
  assert checkpoints.find(copy).step == 1
  (steps / '1').rename(steps / '1.orbax-checkpoint-tmp')
  with pytest.raises(UserError, match='holds no checkpoint'):
    checkpoints.find(copy)


def test_the_name_of_a_half_written_step_is_what_orbax_gives_it(tmp_path, monkeypatch):
  """The step appears under its number when the last byte is there, not before."""
  seen = []
  store = checkpoints.Checkpoints(tmp_path / 'run')
  handler = ocp.StandardCheckpointHandler.finalize
  def finalize(self, directory):
    seen.append(checkpoints.newest_step(tmp_path / 'run'))
    return handler(self, directory)
  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'finalize', finalize)
  with store:
    store.save(7, {'a': jnp.ones(3)}, {'b': jnp.ones(3)}, {})
  assert seen and set(seen) == {None} and checkpoints.newest_step(tmp_path / 'run') == 7


@pytest.mark.parametrize('path', ['nothing', 'file', 'empty'])
def test_a_place_without_a_checkpoint(tmp_path, path):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='holds no checkpoint'):
    checkpoints.find(tmp_path / path)


def test_a_named_step_that_is_not_there(stage1):
  with pytest.raises(UserError, match=str(stage1 / 'checkpoints' / '7')):
    checkpoints.find(stage1 / 'checkpoints' / '7')


def test_the_newest_steps_are_kept(tmp_path):
  with checkpoints.Checkpoints(tmp_path, keep=2) as store:
    for step in (1, 2, 3, 10):
      store.save(step, {'a': jnp.full(3, step)}, {'step': jnp.asarray(step)}, {'step': step})
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [3, 10]
  found = checkpoints.find(tmp_path)
  assert (found.step, found.description) == (10, {'step': 10})
  target = {'a': jax.ShapeDtypeStruct((3,), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
  np.testing.assert_array_equal(checkpoints.load(found, params=target)['params']['a'], [10, 10, 10])


def test_a_checkpoint_brings_its_shape(stage1):
  found = checkpoints.find(stage1)
  assert found.decoder_config(dtype='bfloat16') == dataclasses.replace(tiny.DECODER, vocab_size=384, dtype='bfloat16')
  assert found.vocabulary_path.exists()


FULL = '''
import pathlib, resource, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import conftest, tiny
from calrec_jax.errors import UserError
from calrec_jax.training import checkpoints, trainer
prefetched = trainer._prefetched
def fills_up(*args):
  for step, batch in prefetched(*args):
    if step == 3:
      while checkpoints.newest_step({model_dir!r}) != 2:
        time.sleep(0.01)
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    yield step, batch
trainer._prefetched = fills_up
try:
  tiny.train(pathlib.Path({store!r}), pathlib.Path({model_dir!r}))
except UserError as error:
  print('told:', error)
'''


@pytest.mark.slow
def test_a_place_that_takes_no_more_keeps_the_last_whole_step(tiny_store, tmp_path):
  """A limit on the size of files stands for a full disk: the same calls fail, with another number."""
  tests, model_dir = pathlib.Path(__file__).resolve().parents[1], tmp_path / 'run'
  code = FULL.format(tests=str(tests), root=str(tests.parent), store=str(tiny_store), model_dir=str(model_dir))
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=200,
                        env=os.environ | tiny.READS_CACHE)
  said = r'told: .*/run: a checkpoint cannot be written \(File too large\); step 2 is whole, and the run goes on from it: make'
  assert re.search(said, done.stdout), done.stdout + done.stderr[-3000:]
  assert done.returncode == 0 and checkpoints.newest_step(model_dir) == 2
  tiny.train(tiny_store, model_dir)
  assert checkpoints.newest_step(model_dir) == 6
  assert all(path.name.isdigit() for path in (model_dir / 'checkpoints').iterdir())


def test_a_bug_while_saving_is_no_full_disk(tmp_path):
  with pytest.raises(ValueError, match='a bug'), checkpoints.Checkpoints(tmp_path) as store, store._told():
    raise ValueError('a bug')
  with pytest.raises(UserError, match=r'cannot be written \(No space left on device\); nothing was saved before'):
    with checkpoints.Checkpoints(tmp_path) as store, store._told():
      raise ValueError("RESOURCE_EXHAUSTED: Failed to write 5 bytes: No space left on device [os_error_code='28']")


def test_a_folder_that_may_not_be_written(tiny_store):
  with pytest.raises(UserError, match='/proc/calrec_run: cannot be written'):
    tiny.train(tiny_store, pathlib.Path('/proc/calrec_run'))


def test_a_damaged_step_is_named_with_the_one_before_it(tiny_store, copy):
  for path in (copy / 'checkpoints' / '2' / 'params').rglob('*'):
    if path.is_file():
      path.unlink()
  with pytest.raises(UserError, match=r'checkpoints/2: the checkpoint cannot be read .* remove this step to use step 1'):
    tiny.train(tiny_store, copy, train_steps=2)
  shutil.rmtree(copy / 'checkpoints' / '2')
  tiny.train(tiny_store, copy, train_steps=2)
  assert checkpoints.newest_step(copy) == 2
