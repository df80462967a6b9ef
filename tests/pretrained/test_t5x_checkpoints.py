"""Checkpoints of T5X, without T5X: what is exported comes back bit for bit, and what is no such checkpoint is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from refusals import refused

from calrec_jax import cli
from calrec_jax.inference.loading import load
from calrec_jax.pretrained.t5x_checkpoints import export_checkpoint, find, import_checkpoint
from calrec_jax.training import checkpoints


@pytest.fixture(scope='module')
def exported(trained_run, tmp_path_factory):
  out = tmp_path_factory.mktemp('exported') / 'run'
  assert cli.main(['export', '--checkpoint', str(trained_run), '--format', 't5x', '--out', str(out)]) == 0
  return out


@pytest.fixture
def copy(exported, tmp_path):
  return shutil.copytree(exported, tmp_path / 'copy')


def same(a, b) -> bool:
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def rewrite(step, change) -> None:
  """Writes the tree of a checkpoint anew, after `change`."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.restore(step / 'state')
    change(tree)
    shutil.rmtree(step / 'state')
    checkpointer.save(step / 'state', args=ocp.args.PyTreeSave(tree))


def test_what_is_exported_comes_back_bit_for_bit(trained_run, exported, tmp_path):
  assert find(exported) == exported / 'checkpoint_36'
  assert cli.main(['import', '--from', str(exported), '--out', str(tmp_path / 'back')]) == 0
  there, back = load(trained_run), load(tmp_path / 'back')
  assert same(there.params, back.params)
  assert (back.decoder, back.vocabulary, back.template, back.lengths) == (
      there.decoder, there.vocabulary, there.template, there.lengths)
  assert (tmp_path / 'back/model.gin').read_text() == (exported / 'model.gin').read_text()
  assert not same(there.params, jax.tree.map(lambda x: x * (1 + 1e-7), back.params))


def test_factors_are_merged_and_the_newest_step_is_taken(tiny_store, exported, tmp_path):
  tiny.train(tiny_store, tmp_path / 'run', train_steps=2, decoder=dataclasses.replace(tiny.DECODER, lora_rank=2))
  report = export_checkpoint(tmp_path / 'run', tmp_path / 'out')
  shutil.copytree(exported / 'checkpoint_36', tmp_path / 'out/checkpoint_10')
  assert report['step'] == 2 and find(tmp_path / 'out').name == 'checkpoint_10'
  import_checkpoint(tmp_path / 'out/checkpoint_2', tmp_path / 'back')
  assert same(load(tmp_path / 'run').params, load(tmp_path / 'back').params)


def test_a_run_starts_from_what_is_imported(exported, tiny_store, tmp_path):
  import_checkpoint(exported, tmp_path / 'back')
  with pytest.raises(Exception, match='imported model'):
    tiny.train(tiny_store, tmp_path / 'back')
  tiny.train(tiny_store, tmp_path / 'run', train_steps=1, initial_checkpoint=str(tmp_path / 'back'))
  assert checkpoints.newest_step(tmp_path / 'run') == 1


def test_what_is_no_checkpoint_of_t5x_is_refused(copy, tmp_path):
  step, out = copy / 'checkpoint_36', tmp_path / 'out'
  refused(lambda: import_checkpoint(tmp_path, out), 'holds no checkpoint of T5X')
  refused(lambda: import_checkpoint(tmp_path / 'checkpoint_7', out), 'holds no checkpoint of T5X')
  (copy / 'calrec.json').rename(copy / 'away')
  refused(lambda: import_checkpoint(copy, out), 'calrec.json', 'summarize_config_fn')
  (copy / 'calrec.json').write_text('{"decoder": {"layers": 3}}')
  refused(lambda: import_checkpoint(copy, out), 'calrec.json', 'does not describe a run')
  (copy / 'away').rename(copy / 'calrec.json')
  description = json.loads((copy / 'calrec.json').read_text())
  (copy / 'calrec.json').write_text(json.dumps(description | {'vocabulary': 'another'}))
  refused(lambda: import_checkpoint(copy, out), 'vocabulary.json', 'not the vocabulary')
  (copy / 'calrec.json').write_text(json.dumps(description))
  shutil.rmtree(step / 'state/d')
  refused(lambda: import_checkpoint(copy, out), 'not a whole checkpoint')
  shutil.rmtree(step / 'state')
  refused(lambda: import_checkpoint(copy, out), 'not a whole checkpoint')
  assert not out.exists() and not list(tmp_path.glob('.out*'))


def test_weights_of_another_model_are_refused(copy, tmp_path):
  step, out = copy / 'checkpoint_36', tmp_path / 'out'
  rewrite(step, lambda tree: tree['target']['decoder'].update(extra=np.zeros(3, np.float32)))
  refused(lambda: import_checkpoint(copy, out), '1 parameters are not of this decoder', 'decoder/extra')
  rewrite(step, lambda tree: tree['target']['decoder'].update(extra=np.zeros(3, np.float32), embedding=np.zeros((4, 4))))
  refused(lambda: import_checkpoint(copy, out), 'decoder/embedding has the shape (4, 4)')
  rewrite(step, lambda tree: tree['target']['decoder'].pop('embedding'))
  refused(lambda: import_checkpoint(copy, out), 'decoder/embedding is missing')
  assert not out.exists()


def test_options_that_do_not_go_with_t5x_are_refused(exported, trained_run, tmp_path, capsys):
  assert cli.main(['import', '--from', str(exported), '--dtype', 'bfloat16', '--out', str(tmp_path / 'a')]) == 2
  assert '--dtype' in capsys.readouterr().err
  (tmp_path / 'metrics.json').write_text('{}')
  assert cli.main(['export', '--checkpoint', str(trained_run), '--format', 't5x', '--out', str(tmp_path / 'b'),
                   '--metrics', str(tmp_path / 'metrics.json')]) == 2
  assert '--metrics' in capsys.readouterr().err
  refused(lambda: export_checkpoint(trained_run, exported), 'already in use')
  assert not (tmp_path / 'a').exists() and not (tmp_path / 'b').exists()
