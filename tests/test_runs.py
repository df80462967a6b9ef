"""Inference and ranking by name: what a checkpoint brings, what does not fit, stopping and resuming, JSON on stdout."""

import gzip
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from calrec_jax import cli, runs
from calrec_jax.data.histories import load as load_histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.inference import generate as generating
from calrec_jax.inference.generate import generate
from calrec_jax.inference.loading import fingerprint
from calrec_jax.inference.partial import Partial
from calrec_jax.ranking.bm25 import Bm25Options
from calrec_jax.ranking.candidates import read_candidates
from calrec_jax.ranking.rank_fusion import fuse, read_weights
from calrec_jax.ranking.rankers import RANKERS, RankerOptions
from calrec_jax.text.templates import ItemTemplate

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = {'n_samples': 2, 'max_new_tokens': 6, 'users_per_batch': 8, 'max_users': 20}


@pytest.fixture(scope='module')
def trained(tiny_store, tmp_path_factory) -> pathlib.Path:
  model_dir = tmp_path_factory.mktemp('trained') / 'run'
  tiny.train(tiny_store, model_dir, train_steps=1)
  return model_dir


def infer(store, checkpoint, out, **options) -> dict:
  return runs.infer(checkpoint=str(checkpoint), data_dir=str(store / 'data'), task_name='games', out=str(out),
                    sample=lambda **given: generate(**given, **SMALL | options), gin_text=lambda: '# configuration\n')


def rank(store, out, **options) -> dict:
  return runs.rank(data_dir=str(store / 'data'), task_name='games', template=ItemTemplate(), out=str(out), **options)


def lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_a_checkpoint_brings_all_that_inference_needs(tiny_store, trained, tmp_path):
  report = infer(tiny_store, trained, tmp_path / 'infer')
  generations = lines(tmp_path / 'infer' / runs.GENERATIONS)
  assert report['users'] == len(generations) == 20
  assert {'user_id', 'texts', 'logprobs'} <= generations[0].keys()
  facts = json.loads((tmp_path / 'infer/run.json').read_text())
  assert facts['step'] == 1 and facts['report']['users'] == 20 and set(facts['data']) == {'games'}
  assert (tmp_path / 'infer/config.gin').read_text() == '# configuration\n'
  with pytest.raises(UserError, match='already there'):
    infer(tiny_store, trained, tmp_path / 'infer')


@pytest.mark.parametrize('out, options, message', [
    ('out', {'n_samples': 0}, 'n_samples = 0'), ('file/out', {}, 'cannot be written')])
def test_inference_that_cannot_begin_leaves_nothing(tiny_store, trained, tmp_path, out, options, message):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=message):
    infer(tiny_store, trained, tmp_path / out, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_stopped_and_resumed_inference_is_uninterrupted(tiny_store, trained, tmp_path, monkeypatch):
  infer(tiny_store, trained, tmp_path / 'whole')
  append = Partial.append
  def dying(self, batch):
    if len(self.batches) == 1:
      raise KeyboardInterrupt
    append(self, batch)
  with monkeypatch.context() as patch:
    patch.setattr(Partial, 'append', dying)
    with pytest.raises(KeyboardInterrupt):
      infer(tiny_store, trained, tmp_path / 'stopped')
  assert not (tmp_path / 'stopped' / runs.GENERATIONS).exists()
  with pytest.raises(UserError, match='settings|other'):
    infer(tiny_store, trained, tmp_path / 'stopped', temperature=0.7)
  assert infer(tiny_store, trained, tmp_path / 'stopped')['users_resumed'] == 8
  assert (tmp_path / 'stopped' / runs.GENERATIONS).read_bytes() == (tmp_path / 'whole' / runs.GENERATIONS).read_bytes()


def test_inference_is_not_resumed_with_other_weights(tiny_store, trained, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(generating, '_write', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      infer(tiny_store, trained, tmp_path / 'out')
  tiny.train(tiny_store, tmp_path / trained.name, train_steps=1, seed=1)  # of the same name and step
  with pytest.raises(UserError):
    infer(tiny_store, tmp_path / trained.name, tmp_path / 'out')


def test_texts_of_another_split_are_refused(tiny_store, trained, tmp_path):
  infer(tiny_store, trained, tmp_path / 'infer', split='validation')
  with pytest.raises(UserError, match='generated for the validation split, not for test'):
    rank(tiny_store, tmp_path / 'out', generations=str(tmp_path / 'infer'))
  assert not (tmp_path / 'out').exists()


def test_a_vocabulary_that_was_exchanged_is_noticed(tiny_store, trained, tmp_path):
  copy = pathlib.Path(shutil.copytree(trained, tmp_path / 'copy'))
  cli.main(['vocabulary', '--data', str(tiny_store / 'data/games'), '--size', '300', '--out', str(tmp_path / 'other.json')])
  shutil.copy(tmp_path / 'other.json', copy / 'vocabulary.json')
  with pytest.raises(UserError, match='vocabulary.json: is not the vocabulary'):
    infer(tiny_store, copy, tmp_path / 'infer')
  (copy / 'vocabulary.json').unlink()
  with pytest.raises(UserError, match='vocabulary.json'):
    infer(tiny_store, copy, tmp_path / 'infer')
  assert not (tmp_path / 'infer').exists()


@pytest.mark.parametrize('name, data', [('gmaes', 'data'), ('games', 'nowhere')])
def test_an_unknown_data_set_is_named(tiny_store, tmp_path, name, data):
  with pytest.raises(UserError, match=f'{name}: no such histories folder'):
    runs.find_data(tiny_store / data, name)


def test_ranking_without_generations_has_the_baselines(tiny_store, tmp_path):
  metrics = rank(tiny_store, tmp_path / 'evaluate')
  assert set(metrics['methods']) == {'popularity', 'last_item', 'transitions'}
  stored = json.loads((tmp_path / 'evaluate/metrics.json').read_text())
  assert stored['methods'] == metrics['methods']
  facts = json.loads((tmp_path / 'evaluate/run.json').read_text())
  assert facts['data'] == {'games': metrics['data']['fingerprint']}


def test_generations_are_given_as_a_file_or_its_folder(tiny_store, trained, tmp_path):
  infer(tiny_store, trained, tmp_path / 'infer', max_users=None)
  by_folder = rank(tiny_store, tmp_path / 'a', generations=str(tmp_path / 'infer'))
  by_file = rank(tiny_store, tmp_path / 'b', generations=str(tmp_path / 'infer' / runs.GENERATIONS))
  assert by_folder['methods'] == by_file['methods'] and 'calrec' in by_file['methods']
  with pytest.raises(UserError, match='nothing'):
    rank(tiny_store, tmp_path / 'c', generations=str(tmp_path / 'nothing.jsonl.gz'))
  assert not (tmp_path / 'c').exists()


def test_weights_have_a_fingerprint():
  one, other = {'a': np.zeros(3), 'b': np.ones(2)}, {'a': np.zeros(3), 'b': np.array([1.0, 1.0000001])}
  assert fingerprint(one) == fingerprint(dict(one)) != fingerprint(other)


# Several rankers in a run. Few users at a time, as each ranker's programs are compiled.

FEW = {'n_samples': 2, 'max_new_tokens': None, 'users_per_batch': 2, 'max_users': 5}


def infer_by(rankers, store, checkpoint, out, *, ranker_options=None, split='test', **more) -> dict:
  options = RankerOptions(**{'candidates': 16, 'beam_width': 40, 'shortlist_size': 40} | (ranker_options or {}))
  return runs.infer(checkpoint=str(checkpoint), data_dir=str(store / 'data'), task_name='games', out=str(out), rankers=rankers,
                    ranker_options=options, sample=lambda **given: generate(**given, **FEW, split=split), **more)


@pytest.fixture(scope='module')
def ranked(tiny_store, trained_run, tmp_path_factory) -> pathlib.Path:
  """What all rankers found for the test split."""
  out = tmp_path_factory.mktemp('ranked') / 'infer'
  infer_by(RANKERS, tiny_store, trained_run, out)
  return out


def candidates(folder: pathlib.Path, ranker: str) -> pathlib.Path:
  return folder / f'candidates-{ranker}.jsonl.gz'


def test_each_ranker_has_candidates_and_a_row_in_the_table(tiny_store, ranked, tmp_path):
  assert {path.name for path in ranked.glob('*.gz')} == {runs.GENERATIONS, *(candidates(ranked, name).name for name in RANKERS)}
  users = [row['user_id'] for row in lines(ranked / runs.GENERATIONS)]
  assert len(users) == 5
  for name in RANKERS:
    assert [row['user_id'] for row in lines(candidates(ranked, name))] == users
    assert all(len(row['item_ids']) == len(row['scores']) == 16 for row in lines(candidates(ranked, name)))
  metrics = rank(tiny_store, tmp_path / 'evaluate', generations=str(ranked),
                 evaluate=lambda **given: evaluate(**given, max_users=5))
  assert set(metrics['methods']) == {'calrec', *RANKERS[1:], 'popularity', 'last_item', 'transitions'}
  # The catalogue has 16 items, so that all are listed, and the table's rows are judged by the rankings that were written.
  for name in RANKERS:
    judged = lines(tmp_path / f'evaluate/rankings-{"calrec" if name == "bm25" else name}.jsonl.gz')
    for row, written in zip(judged, lines(candidates(ranked, name)), strict=True):
      assert {each['item_id']: each['score'] for each in row['top']} == pytest.approx(
          dict(zip(written['item_ids'], written['scores'], strict=True)))


def test_several_rankers_stopped_and_resumed_are_uninterrupted(tiny_store, trained_run, ranked, tmp_path, monkeypatch):
  append = Partial.append
  def dying(self, rows):
    append(self, rows)
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(Partial, 'append', dying)
    with pytest.raises(KeyboardInterrupt):
      infer_by(RANKERS, tiny_store, trained_run, tmp_path / 'out')
  assert not list((tmp_path / 'out').glob('*.gz'))
  with pytest.raises(UserError, match='other settings .*ranking'):
    infer_by(RANKERS, tiny_store, trained_run, tmp_path / 'out', ranker_options={'candidates': 15})
  assert infer_by(RANKERS, tiny_store, trained_run, tmp_path / 'out')['users_resumed'] == 2
  for path in ranked.glob('*.gz'):
    assert (tmp_path / 'out' / path.name).read_bytes() == path.read_bytes(), path.name
  with pytest.raises(UserError, match='candidates-dense.jsonl.gz: the output is already there'):
    infer_by('dense', tiny_store, trained_run, tmp_path / 'out')


def test_an_index_of_the_same_catalogue_saves_time_alone(tiny_store, trained_run, ranked, tmp_path):
  for name in ('games', 'books'):
    cli.main(['index', '--catalogue', str(tiny_store / 'data' / name), '--checkpoint', str(trained_run), '--out',
              str(tmp_path / name)])
  report = infer_by('dense', tiny_store, trained_run, tmp_path / 'out', index=str(tmp_path / 'games'))
  assert candidates(tmp_path / 'out', 'dense').read_bytes() == candidates(ranked, 'dense').read_bytes()
  assert not (tmp_path / 'out' / runs.GENERATIONS).exists() and 'texts_per_user' not in report  # nothing was sampled
  for options, told in (({'index': str(tmp_path / 'books')}, 'an index of another catalogue than that of games'),
                        ({'index': str(tmp_path / 'games'), 'bm25': Bm25Options(k1=0.9)}, 'another BM25'),
                        ({'index': str(tmp_path)}, 'not a whole index')):
    with pytest.raises(UserError, match=told):
      infer_by('dense', tiny_store, trained_run, tmp_path / 'other', **options)
    assert not (tmp_path / 'other').exists()


def test_seen_items_are_no_candidates(tiny_store, trained_run, ranked, tmp_path):
  data = load_histories(tiny_store / 'data/games')
  infer_by(RANKERS, tiny_store, trained_run, tmp_path / 'out', exclude_seen=True)
  numbers = {item_id: number for number, item_id in enumerate(data.item_ids)}
  for name in RANKERS:
    mine, all_items = (read_candidates(candidates(folder, name), numbers) for folder in (tmp_path / 'out', ranked))
    for user_id, found in mine.items():
      seen = set(data.seen(data.user_ids.index(user_id), 'test')[:-1].tolist())
      assert seen and set(found.items.tolist()) == set(all_items[user_id].items.tolist()) - seen, name
  places = []
  for number, folder in enumerate((tmp_path / 'out', ranked)):  # a protocol without them finds no difference
    rank(tiny_store, tmp_path / f'evaluate-{number}', generations=str(folder),
         evaluate=lambda **given: evaluate(**given, max_users=5, seen_items='filtered'))
    rows = lines(tmp_path / f'evaluate-{number}/rankings-dense.jsonl.gz')
    new = [row for row in rows if numbers[row['target']] not in data.seen(data.user_ids.index(row['user_id']), 'test')[:-1]]
    places.append([(row['user_id'], row['better'], row['tied']) for row in new])
  assert places[0] == places[1] and places[0]


def test_a_lone_bm25_cannot_leave_out_what_was_seen(tiny_store, trained_run, tmp_path):
  with pytest.raises(UserError, match=r'infer.exclude_seen: a lone bm25 ranks in `calrec evaluate`'):
    infer_by('bm25', tiny_store, trained_run, tmp_path / 'out', exclude_seen=True)
  assert not (tmp_path / 'out').exists()


def test_a_user_who_has_bought_everything_is_named(tiny_store, trained_run, tmp_path, monkeypatch):
  data = load_histories(tiny_store / 'data/games')
  monkeypatch.setattr(generating, 'context', lambda *_: np.arange(len(data.item_ids), dtype=np.int32))
  with pytest.raises(UserError, match='infer.exclude_seen: user .* has every item'):
    infer_by('dense', tiny_store, trained_run, tmp_path / 'out', exclude_seen=True)


def test_weights_are_learned_on_validation_users_and_used_on_the_test_split(tiny_store, trained_run, tmp_path):
  names = ('dense', 'likelihood', 'fused')
  learned = infer_by(names, tiny_store, trained_run, tmp_path / 'validation', split='validation')['fusion']
  assert learned['weights'].keys() == learned['gain'].keys() == {'dense', 'likelihood'} and learned['users'] == 5
  assert read_weights(tmp_path / 'validation') == learned['weights']
  given = {'fusion': str(tmp_path / 'validation')}
  assert 'fusion' not in infer_by(names, tiny_store, trained_run, tmp_path / 'test', ranker_options=given)
  numbers = {item_id: number for number, item_id in enumerate(load_histories(tiny_store / 'data/games').item_ids)}
  dense, likelihood, fused = (read_candidates(candidates(tmp_path / 'test', name), numbers) for name in names)
  for user in fused:
    wanted = fuse({'dense': dense[user], 'likelihood': likelihood[user]}, learned['weights'])
    np.testing.assert_array_equal(fused[user].items, wanted.items)
    np.testing.assert_allclose(fused[user].scores, wanted.scores)
  with pytest.raises(UserError, match='no weights of a fusion'):
    infer_by(names, tiny_store, trained_run, tmp_path / 'none', ranker_options={'fusion': str(tmp_path / 'test')})
  assert not (tmp_path / 'none').exists()


def calrec(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
  environment = dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS='')
  return subprocess.run([sys.executable, '-m', 'calrec_jax.cli', *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                        env=environment, timeout=300)


def test_stdout_is_json_alone_and_stderr_is_ours_alone(tiny_store, tmp_path):
  """From another folder, as separate processes: each configured verb's own words and numbers, and no library's."""
  data = tiny.gin([f"DATA_DIR='{tiny_store / 'data'}'", "MIXTURE_OR_TASK_NAME='games'", "INFER_OUTPUT_DIR='infer'"])
  small = tiny.gin(f'sample.{name}={value}' for name, value in SMALL.items())
  done = calrec(*tiny.gin_arguments(tiny_store, 'stage1', 'run', '--json'), cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  found = {'loss', 'nig', 'tt', 'ut', 'recall@10', 'ndcg@10', 'recall@10_unseen', 'ndcg@10_unseen'}
  assert json.loads(done.stdout).keys() == found and done.stdout.count('\n') == 1
  assert 'step 2: validation' in done.stderr
  errors = done.stderr
  done = calrec('infer', '--gin_file=gin/runs/infer.gin', "--gin.CHECKPOINT_PATH='run'", *data, *small, '--json', cwd=tmp_path)
  assert done.returncode == 0 and json.loads(done.stdout)['users'] == 20, done.stderr
  errors += done.stderr
  done = calrec('evaluate', '--gin_file=gin/runs/evaluate.gin', *data, "--gin.EVAL_OUTPUT_DIR='evaluate'",
                '--gin.ranking.max_users=20', '--json', cwd=tmp_path)
  assert done.returncode == 0 and 'calrec' in json.loads(done.stdout)['methods'], done.stderr
  errors += done.stderr
  assert not re.search(r'absl|cudart|oneDNN|cuInit|TensorFlow|Warning|save_interval', errors), errors
  # Wrong input, as a process: one line, exit code 2.
  done = calrec(*tiny.gin_arguments(tiny_store, 'stage1', 'other', '--gin.BATCH_SIZE=0'), cwd=tmp_path)
  assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
  assert done.stderr.startswith('calrec: error: BATCH_SIZE = 0')
  assert not (tmp_path / 'other').exists()
