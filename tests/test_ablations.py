"""Ablations: every step is a command with its results beside it, and what is done is not done again."""

import json
import subprocess

import pytest
import tiny

from calrec_jax import ablations, cli
from calrec_jax.errors import UserError


@pytest.fixture
def calls(monkeypatch):
  """The verbs that run, in this process."""
  verbs = []

  def run(command, **_):
    verbs.append(command[3])
    return subprocess.CompletedProcess(command, cli.main(command[3:]))
  monkeypatch.setattr(ablations.subprocess, 'run', run)
  return verbs


def command(store, out, *more, over=('gin/ablations/no_contrastive.gin',), steps=2):
  bindings = [*tiny.DECODER_GIN, f"DATA_DIR='{store / 'data'}'", f"VOCABULARY='{store / 'vocabulary.json'}'",
              f'TRAIN_STEPS={steps}', "MIXTURE_OR_TASK_NAME='books'", f'TASK_FEATURE_LENGTHS={tiny.LENGTHS}', 'BATCH_SIZE=8',
              'sample.n_samples=2', 'sample.max_users=8', 'sample.max_new_tokens=8', 'ranking.max_users=8']
  return ['ablate', '--gin_file=gin/models/tiny.gin', '--gin_file=gin/runs/stage1.gin', '--over', *over, '--task', 'books',
          '--out', str(out), *more, *tiny.gin(bindings)]


@pytest.mark.slow
def test_two_runs_of_a_seed_in_one_table_then_a_second_seed(tiny_store, tmp_path, calls, capsys):
  assert cli.main(command(tiny_store, tmp_path / 'out', '--seeds', '1', '--json')) == 0
  assert calls == ['train', 'infer', 'evaluate'] * 2
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert [(row['name'], row['seeds']) for row in sorted(found['methods'], key=lambda row: row['name'])] == [
    ('base', 1), ('no_contrastive', 1)]
  assert found['baseline'] == 'base' and found['users'] == 8
  for name, alpha in (('base', None), ('no_contrastive', 0.0)):
    gin_text = (tmp_path / 'out' / name / 'seed0/train/config.gin').read_text()
    assert ('objective.alpha = 0.0' in gin_text) == (alpha == 0.0)
  calls.clear()
  (tmp_path / 'out/base/seed0/evaluate/metrics.json').unlink()
  for path in (tmp_path / 'out/base/seed0/evaluate').iterdir():
    path.unlink()
  assert cli.main(command(tiny_store, tmp_path / 'out', '--seeds', '2')) == 0
  assert calls == ['evaluate', 'train', 'infer', 'evaluate', 'train', 'infer', 'evaluate']
  assert 'ndcg@10, difference to base' in capsys.readouterr().out
  assert cli.main(command(tiny_store, tmp_path / 'out', steps=3)) == 2
  assert 'begun with other gin files' in capsys.readouterr().err


def test_a_step_that_fails_names_its_log(tmp_path, monkeypatch):
  def fail(command, stdout, **_):
    stdout.write('first\ncalrec: error: no such data\n')
    return subprocess.CompletedProcess(command, 2)
  monkeypatch.setattr(ablations.subprocess, 'run', fail)
  with pytest.raises(UserError, match=r'train failed \(calrec: error: no such data\).*train\.log'):
    ablations.ablate(['gin/runs/stage1.gin'], [], task='books', out=tmp_path / 'out', seeds=1)
  assert not (tmp_path / 'out/base/seed0/trained').exists()


def test_a_binding_that_hides_a_change_is_refused(tmp_path):
  with pytest.raises(UserError, match='--gin.MIXTURE_OR_TASK_NAME wins'):
    ablations.ablate(['gin/runs/stage1.gin'], ['gin/ablations/stage1_only.gin'], task='books', out=tmp_path / 'out',
                     bindings=["MIXTURE_OR_TASK_NAME='books'"])


@pytest.mark.parametrize(('over', 'told'), [
  (['gin/ablations/none.gin'], 'no such file'), (['gin/ablations/no_tt.gin', 'other/no_tt.gin'], "called 'no_tt'"),
  (['base.gin'], "called 'base'")])
def test_bad_changes(tmp_path, over, told):
  with pytest.raises(UserError, match=told):
    ablations.ablate(['gin/runs/stage1.gin'], over, task='books', out=tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
