"""Buckets: the same commands give the same bytes there as in folders, may be stopped, and say what is wrong."""

import gzip
import json
import os
import pathlib
import subprocess

import fsspec
import jax
import numpy as np
import pretrained_models
import pytest
import tiny
from fake_gcs import FakeGcs

from calrec_jax import cli, outputs, storage
from calrec_jax.data import histories
from calrec_jax.errors import UserError
from calrec_jax.inference import partial
from calrec_jax.inference.loading import load
from calrec_jax.pretrained import importing
from calrec_jax.training import checkpoints

BUCKET = 'my-bucket'


@pytest.fixture(scope='module')
def gcs():
  """One server for all tests here: TensorStore reads its address once."""
  with FakeGcs() as server, pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment.items():
      patch.setenv(name, value)
    fsspec.get_filesystem_class('gs').clear_instance_cache()
    yield server
  fsspec.get_filesystem_class('gs').clear_instance_cache()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  monkeypatch.setenv('CALREC_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def memory():
  """fsspec's file system in memory, empty."""
  system = fsspec.filesystem('memory')
  yield system
  system.store.clear()
  system.pseudo_dirs[:] = ['']


def run(*arguments: object) -> None:
  assert cli.main([str(argument) for argument in arguments]) == 0


def chain(root: str, raw: str) -> None:
  """Dumps to rankings, everything in `root`; training is stopped after two of four steps."""
  prepared = ('--min_count', 3, '--out', f'{root}/data/shop', '--name', 'shop')
  run('prepare', 'dumps', '--reviews', f'{raw}/reviews.json.gz', '--meta', f'{raw}/meta.json.gz', *prepared)
  run('vocabulary', '--data', f'{root}/data/shop', '--size', 400, '--out', f'{root}/vocabulary.json')
  shared = tiny.gin([f"DATA_DIR='{root}/data'", "MIXTURE_OR_TASK_NAME='shop'"])
  for steps in (2, 4):
    run('train', '--gin_file=gin/runs/stage1.gin', *shared, *tiny.gin([
        f"MODEL_DIR='{root}/stage1'", f"VOCABULARY='{root}/vocabulary.json'", f'TRAIN_STEPS={steps}', 'BATCH_SIZE=8',
        "TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 32}", 'rows.window_steps=4', 'schedule.save_every=2',
        'train.allow_changes=True', *tiny.DECODER_GIN]))
  run('index', '--catalogue', f'{root}/data/shop', '--checkpoint', f'{root}/stage1', '--out', f'{root}/index')
  run('infer', '--gin_file=gin/runs/infer.gin', *shared, *tiny.gin([
      f"CHECKPOINT_PATH='{root}/stage1'", f"INFER_OUTPUT_DIR='{root}/infer'", f"INDEX='{root}/index'", *INFER]))
  run('evaluate', '--gin_file=gin/runs/evaluate.gin', *shared, *tiny.gin([
      f"INFER_OUTPUT_DIR='{root}/infer'", f"EVAL_OUTPUT_DIR='{root}/evaluate'", 'ranking.max_users=10']))
  run('baselines', f'{root}/data/shop', '--methods', 'popularity', '--max_users', 10, '--out', f'{root}/baselines')


INFER = ['sample.n_samples=3', 'sample.max_new_tokens=8', 'sample.max_users=10', 'sample.users_per_batch=2',
         "infer.rankers=('bm25', 'dense')"]


@pytest.fixture(scope='module')
def chains(gcs, tmp_path_factory) -> pathlib.Path:
  """The chain in a folder, which is returned, and in the bucket."""
  place = tmp_path_factory.mktemp('chain')
  run('synthesize', '--out', place / 'raw', '--users', 60, '--items', 20, '--categories', 1)
  [reviews], [meta] = (place / 'raw').glob('*_5.json.gz'), (place / 'raw').glob('meta_*')
  reviews.rename(place / 'raw/reviews.json.gz')
  meta.rename(place / 'raw/meta.json.gz')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('CALREC_CACHE', str(place / 'cache'))
    chain(str(place), str(place / 'raw'))
    storage.upload(place / 'raw', f'gs://{BUCKET}/raw')
    chain(f'gs://{BUCKET}', f'gs://{BUCKET}/raw')
  return place


def test_a_bucket_has_the_bytes_of_a_folder(gcs, chains):
  same = ['data/shop/sequences.jsonl.gz', 'data/shop/items.jsonl.gz', 'data/shop/dataset.json', 'vocabulary.json',
          'stage1/vocabulary.json', 'infer/generations.jsonl.gz', 'infer/candidates-bm25.jsonl.gz',
          'infer/candidates-dense.jsonl.gz', 'evaluate/rankings-calrec.jsonl.gz', 'evaluate/rankings-dense.jsonl.gz',
          'evaluate/metrics.json', 'index/items.jsonl.gz', 'index/texts.npy', 'baselines/metrics.json']
  for name in same:
    assert gcs[BUCKET, name] == (chains / name).read_bytes(), name
  places = {path.relative_to(chains).as_posix() for folder in ('data', 'stage1', 'infer', 'evaluate', 'index', 'baselines')
            for path in (chains / folder).rglob('*') if path.is_file()}
  plain = lambda names: {name for name in names if 'checkpoints/' not in name and 'tfevents' not in name
                         and 'item_tokens' not in name}
  there = plain(name for name in gcs.names(BUCKET) if not name.startswith('raw/'))
  assert there == plain(places) | {'vocabulary.json'}  # run.json and the like too, and no partial file
  assert json.loads(gcs[BUCKET, 'infer/run.json'])['checkpoint'] == f'gs://{BUCKET}/stage1'


def test_a_resumed_run_in_a_bucket_has_the_weights_of_one_in_a_folder(gcs, chains):
  there, here = (checkpoints.find(f'{root}/stage1') for root in (f'gs://{BUCKET}', chains))
  assert there.step == here.step == 4 and checkpoints.whole_steps(f'gs://{BUCKET}/stage1') == [2, 4]
  loaded = [load(found.folder).params for found in (there, here)]
  jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_curves_of_a_run_in_a_bucket(gcs, chains, tmp_path):
  for name in gcs.names(BUCKET, 'stage1/events'):
    (tmp_path / name.rpartition('/')[2]).write_bytes(gcs[BUCKET, name])
  steps = {step for name, step in tiny.scalars(tmp_path) if name == 'train/loss'}
  assert steps == {step for name, step in tiny.scalars(chains / 'stage1') if name == 'train/loss'} and 4 in steps


def test_a_half_written_step_is_not_seen(gcs, chains):
  for name in gcs.names(BUCKET, 'stage1/checkpoints/4/'):
    if not name.startswith('stage1/checkpoints/4/commit'):
      gcs.put(BUCKET, name.replace('stage1/checkpoints/4', 'half/checkpoints/8'), gcs[BUCKET, name])
  assert checkpoints.newest_step(f'gs://{BUCKET}/half') is None
  with pytest.raises(UserError, match=f'gs://{BUCKET}/half: holds no checkpoint'):
    checkpoints.find(f'gs://{BUCKET}/half')


def test_best_of_a_run_in_a_bucket(gcs, chains):
  assert checkpoints.find(f'gs://{BUCKET}/stage1/best').step == 4
  assert checkpoints.find(f'gs://{BUCKET}/stage1/checkpoints/2').step == 2


def test_interrupted_inference_goes_on(gcs, chains, monkeypatch):
  arguments = ('infer', '--gin_file=gin/runs/infer.gin', *tiny.gin([
      f"DATA_DIR='gs://{BUCKET}/data'", "MIXTURE_OR_TASK_NAME='shop'", f"CHECKPOINT_PATH='gs://{BUCKET}/stage1'",
      f"INFER_OUTPUT_DIR='gs://{BUCKET}/stopped'", *INFER]))
  append, written = partial.Partial.append, []

  def stopping(self, rows) -> None:
    if len(written) == 3:
      raise KeyboardInterrupt
    written.append(rows)
    append(self, rows)
  with monkeypatch.context() as patch:
    patch.setattr(partial.Partial, 'append', stopping)
    assert cli.main(list(arguments)) == 130
  assert gcs.names(BUCKET, 'stopped/') == ['stopped/generations.jsonl.gz.partial']
  run(*arguments)
  assert json.loads(gcs[BUCKET, 'stopped/run.json'])['report']['users_resumed'] == 6
  for name in ('generations', 'candidates-dense'):
    assert gcs[BUCKET, f'stopped/{name}.jsonl.gz'] == gcs[BUCKET, f'infer/{name}.jsonl.gz']
  assert 'stopped/generations.jsonl.gz.partial' not in gcs.names(BUCKET, 'stopped/')


def test_a_model_is_imported_into_a_bucket(gcs, tmp_path):
  source = pretrained_models.save(pretrained_models.make('llama'), tmp_path / 'hf')
  gcs.uploaded.clear()
  for out in (tmp_path / 'model', f'gs://{BUCKET}/model'):
    importing.import_model(source, out)
  assert [name.rpartition('/')[2] for name in gcs.uploaded][-3:] == [storage.COMMIT_SUCCESS_FILE] * 3
  here, there = load(tmp_path / 'model'), load(f'gs://{BUCKET}/model')
  jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
  storage.upload(tmp_path / 'model', f'gs://{BUCKET}/copied')  # as a tool for buckets would
  assert load(f'gs://{BUCKET}/copied').weights == here.weights


def test_a_refused_checkpoint_ends_with_a_line(gcs, chains, monkeypatch, capsys):
  monkeypatch.setattr(gcs, 'refuse', 'refused/')
  assert cli.main(['train', '--gin_file=gin/runs/stage1.gin', *tiny.gin([
      f"DATA_DIR='gs://{BUCKET}/data'", f"MODEL_DIR='gs://{BUCKET}/refused'", f"VOCABULARY='gs://{BUCKET}/vocabulary.json'",
      'TRAIN_STEPS=2', 'BATCH_SIZE=8', *tiny.DECODER_GIN])]) == 2
  told = capsys.readouterr().err.strip().splitlines()[-1]
  assert told.startswith(f'calrec: error: gs://{BUCKET}/refused/vocabulary.json: cannot be written') and 'your rights' in told


def test_a_vocabulary_brings_what_lies_beside_it(memory):
  spec = {'added_tokens': [], 'model': {'type': 'BPE', 'vocab': {'a': 0, '<end>': 1, '<s>': 2}, 'merges': []}}
  memory.pipe({'/b/hf/tokenizer.json': json.dumps(spec).encode(), '/b/hf/model.safetensors': b'large',
               '/b/hf/tokenizer_config.json': b'{"eos_token": "<end>"}'})
  from calrec_jax.text.vocabularies import load_vocabulary
  assert load_vocabulary('memory://b/hf').eos_id == load_vocabulary('memory://b/hf/tokenizer.json').eos_id == 1
  assert not list(pathlib.Path(os.environ['CALREC_CACHE']).rglob('model.safetensors'))


def test_copies_follow_the_bucket(memory, cache, monkeypatch):
  memory.pipe({'/b/x/one': b'1', '/b/x/deep/two': b'22', '/b/xyz': b'no'})
  fetched = []
  get = type(memory).get_file
  monkeypatch.setattr(type(memory), 'get_file', lambda self, path, *more, **options: (fetched.append(path), get(
      self, path, *more, **options))[1])
  folder = storage.local('memory://b/x')
  read = lambda: {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
  assert read() == {'one': b'1', 'deep/two': b'22'} and len(fetched) == 2
  assert storage.local('memory://b/x/') == folder and len(fetched) == 2
  (folder / 'ours').write_bytes(b'kept')  # the table of tokens is written beside the data
  memory.pipe({'/b/x/one': b'other', '/b/x/three': b'3'})
  memory.rm('/b/x/deep/two')
  storage.local('memory://b/x')
  assert read() == {'one': b'other', 'three': b'3', 'ours': b'kept'} and len(fetched) == 4
  assert storage.local('memory://b/x/one').read_bytes() == b'other' and len(fetched) == 4
  (folder / 'one').unlink()
  storage.local('memory://b/x')
  assert read()['one'] == b'other' and cache in folder.parents


def test_outputs_appear_when_they_are_whole(memory):
  with pytest.raises(ZeroDivisionError), outputs.new_folder('memory://b/out') as scratch:
    (scratch / 'file').write_text('half')
    raise ZeroDivisionError
  with pytest.raises(ZeroDivisionError), outputs.new_file('memory://b/file') as scratch:
    scratch.write_text('half')
    raise ZeroDivisionError
  assert not memory.find('/b')
  with outputs.new_folder('memory://b/out') as scratch:
    (scratch / 'file').write_text('whole')
    assert not memory.find('/b')
  assert memory.cat_file('/b/out/file') == b'whole'
  with pytest.raises(UserError, match='memory://b/out: the output is already in use'), outputs.new_folder('memory://b/out'):
    pass
  with pytest.raises(UserError, match='already in use'):
    outputs.check_unused('memory://b/out/file')
  outputs.check_unused('memory://b/ou')
  outputs.write_json('memory://b/out/file', {'a': 1})  # a file is replaced
  assert json.loads(memory.cat_file('/b/out/file')) == {'a': 1}


def test_processes_meet_in_the_bucket(memory):
  memory.pipe({'/b/work/old': b'0', '/b/work/.dot': b'no'})
  both = [storage.Workplace('memory://b/work', resumes=True) for _ in range(2)]
  with both[0] as first, both[1] as second:
    assert [path.name for path in first.folder.iterdir()] == ['old'] and first.folder != second.folder
    (first.folder / 'one').write_bytes(b'1')
    (second.folder / 'two').write_bytes(b'2')
    (second.folder / '.two.123').write_bytes(b'being written')
    second.push(every=60.)
    assert not memory.exists('/b/work/two')
    second.push()
    first.pull()
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == {'old': b'0', 'one': b'1', 'two': b'2'}
    for name in ('old', 'two'):
      (first.folder / name).unlink()
    (first.folder / 'all').write_bytes(b'12')
    scratch = first.folder
  assert {name.rpartition('/')[2]: memory.cat_file(name) for name in memory.find('/b/work')} == {
      'one': b'1', 'all': b'12', '.dot': b'no'}
  assert not scratch.exists()


def test_work_is_kept_when_it_is_stopped(memory):
  with pytest.raises(KeyboardInterrupt), storage.Workplace('memory://b/stopped') as work:
    (work.folder / 'half').write_bytes(b'so far')
    raise KeyboardInterrupt
  assert memory.cat_file('/b/stopped/half') == b'so far'


def test_a_folder_is_worked_in_itself(tmp_path):
  with storage.Workplace(tmp_path / 'new', resumes=True) as work:
    work.push()
    work.pull()
    assert work.folder == tmp_path / 'new'
  assert storage.local(tmp_path / 'x') == tmp_path / 'x' and storage.names(tmp_path / 'none') == []


def test_a_data_set_without_its_sequences_is_none(memory):
  memory.pipe({'/b/data/shop/items.jsonl.gz': gzip.compress(b'{}'), '/b/data/shop/dataset.json': b'{"name": "shop"}'})
  with pytest.raises(UserError, match='no sequences.jsonl.gz'):
    histories.load('memory://b/data/shop')


@pytest.mark.parametrize('arguments, told', [
    (['baselines', 'gs2://b/x', '--out', 'o'], 'gs2://b/x: gs2:// is nothing that fsspec knows'),
    (['baselines', 'memory://b/x', '--out', 'o'], 'memory://b/x: no such file or folder'),
    (['baselines', 'memory://b/../x', '--out', 'o'], r'".." is no name here'),
    (['score', '--checkpoint', 'memory://b/run', '--text', 'a'], 'memory://b/run: training runs and checkpoints lie in folders '
     'or in gs:// buckets'),
    (['compare', 'a', 'small=gs://b/x'], 'small=gs://b/x: `calrec compare` works in folders of this machine; copy it here'),
    (['import', '--from', 'gs://b/x', '--out', 'o'], 'gs://b/x: `calrec import` works in folders'),
    (['evaluate', '--gin_file=memory://b/none.gin'], 'memory://b/none.gin: no such file'),
])
def test_wrong_places(memory, capsys, arguments, told):
  memory.pipe('/b/../x', b'strange')
  assert cli.main(arguments) == 2
  assert told in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_not_installed_is_named(monkeypatch):
  def missing(scheme: str) -> None:
    raise ImportError('Please install gcsfs')
  monkeypatch.setattr(fsspec, 'filesystem', missing)
  with pytest.raises(UserError, match=r'gs:// cannot be reached from here: install calrec_jax\[gcs\]'):
    storage.local('gs://my-bucket/x')


@pytest.mark.slow
def test_processes_train_and_infer_in_a_bucket(gcs, tiny_store):
  storage.upload(tiny_store, f'gs://{BUCKET}/shared')
  data = [f"DATA_DIR='gs://{BUCKET}/shared/data'", "MIXTURE_OR_TASK_NAME='books'"]
  infer = ['--gin_file=gin/runs/infer.gin', *tiny.gin([*data, f"CHECKPOINT_PATH='gs://{BUCKET}/by_two'", *INFER])]
  train = [*tiny.gin_arguments(tiny_store, 'stage1', pathlib.Path('unused'))[1:], *tiny.gin([
      *data, f"VOCABULARY='gs://{BUCKET}/shared/vocabulary.json'", f"MODEL_DIR='gs://{BUCKET}/by_two'"])]
  for arguments in (['train', *train], ['infer', *infer, *tiny.gin([f"INFER_OUTPUT_DIR='gs://{BUCKET}/two'"])]):
    command = ['launch/local_run.sh', '--processes', '2', '--devices', '1', '--', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | tiny.READS_CACHE)
    assert done.returncode == 0, done.stderr[-3000:]
  run('infer', *infer, *tiny.gin([f"INFER_OUTPUT_DIR='gs://{BUCKET}/one'"]))
  plain = {name.partition('/')[2] for name in gcs.names(BUCKET, 'two/') if 'events' not in name}
  assert plain == {'candidates-bm25.jsonl.gz', 'candidates-dense.jsonl.gz', 'config.gin', 'generations.jsonl.gz', 'run.json'}
  for name in ('candidates-bm25', 'candidates-dense', 'generations'):
    assert gcs[BUCKET, f'two/{name}.jsonl.gz'] == gcs[BUCKET, f'one/{name}.jsonl.gz']
