"""A cached Task gives the examples of the uncached one, in its order; a cache of other examples is refused."""

import filecmp
import pathlib
import sys

import numpy as np
import pytest
import seqio
import tiny

from calrec_jax.data import histories as histories_lib
from calrec_jax.data import workers
from calrec_jax.errors import UserError
from calrec_jax.tasks import cache_layout, caching, registry
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary, template_phrases, train_vocabulary

NAME = 'shop'


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """`data/shop`, of 530 users, and two vocabularies."""
  folder = tmp_path_factory.mktemp('store')
  data = tiny.make_histories(NAME, users=530)
  (folder / 'data' / NAME).mkdir(parents=True)
  histories_lib.write(folder / 'data' / NAME, data, {})
  texts = [ItemTemplate().item_text(item) for item in data.items]
  for name, some in (('vocabulary', texts), ('other', texts[:1])):
    train_vocabulary(some, size=320, phrases=template_phrases(ItemTemplate())).save(folder / f'{name}.json')
  return folder


@pytest.fixture(scope='module', params=['last', 'all'])
def cached(request, store, tmp_path_factory):
  """The folder of caches, the report, and `targets`."""
  out = tmp_path_factory.mktemp(request.param)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(cache_layout, 'SHARD_BYTES', 1)
    return out, make(store, out, targets=request.param), request.param


@pytest.fixture
def small(tmp_path):
  """A shop of 5 users."""
  (tmp_path / 'data' / NAME).mkdir(parents=True)
  histories_lib.write(tmp_path / 'data' / NAME, tiny.make_histories(NAME, users=5), {})
  return tmp_path


@pytest.fixture(autouse=True)
def clean(monkeypatch):
  """Nothing registered or cached before; a file for each 256 examples."""
  monkeypatch.setattr(seqio.TaskRegistry, '_REGISTRY', {})
  monkeypatch.setattr(seqio.MixtureRegistry, '_REGISTRY', {})
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [])
  monkeypatch.setattr(cache_layout, 'SHARD_BYTES', 1)


def make(store, out, **options) -> dict:
  return caching.cache(store / 'data' / NAME, out, **{'vocabulary': store / 'vocabulary.json', **options})


def task(store, place=None, *, vocabulary='vocabulary', **options) -> seqio.Task:
  registry.register((place or store) / 'data', load_vocabulary(store / f'{vocabulary}.json'), **options)
  return seqio.get_mixture_or_task(NAME)


def examples(source, split: str, use_cached: bool, **options) -> list[dict]:
  dataset = source.get_dataset(None, split, use_cached=use_cached, **{'shuffle': False, **options})
  return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in dataset.as_numpy_iterator()]


def test_the_cached_examples_are_the_uncached_ones_in_their_order(store, cached):
  out, report, targets = cached
  found = task(store, targets=targets)
  seqio.add_global_cache_dirs([str(out)])
  for split in found.splits:
    read, expected = examples(found, split, True), examples(found, split, False)
    assert read == expected and len(expected) == report['examples'][split] == found.get_cached_stats(split)['examples']
    files = sorted((out / NAME).glob(f'{split}.tfrecord-*'))
    assert len(files) == report['shards'][split] == len(found.source.list_shards(split)) >= 2
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.2 * min(sizes)
  assert (report['shards']['train'] > report['shards']['test']) == (targets == 'all')
  shuffled = examples(found, 'test', True, shuffle=True, seed=1)
  assert shuffled != read and sorted(row['user_id'] for row in shuffled) == sorted(row['user_id'] for row in read)


def test_t5x_reads_the_cache_through_a_feature_converter(store, cached):
  out, _, targets = cached
  task(store, targets=targets)
  seqio.add_global_cache_dirs([str(out)])
  batches = [[{name: value.tolist() for name, value in row.items()} for row in seqio.get_dataset(
      'stage1_mixture', {'inputs': 96, 'targets': 32}, seqio.PrefixLMFeatureConverter(pack=True), dataset_split='test',
      shuffle=False, use_cached=use_cached, num_epochs=1).as_numpy_iterator()] for use_cached in (True, False)]
  assert batches[0] == batches[1] and len(batches[0]) > 10


def test_each_host_reads_its_part_of_the_cache(store, cached):
  out, _, targets = cached
  found = task(store, targets=targets)
  seqio.add_global_cache_dirs([str(out)])
  parts = [examples(found, 'test', True, shard_info=seqio.ShardInfo(k, 2)) for k in range(2)]
  assert sorted(row['user_id'] for part in parts for row in part) == [f'{NAME}{k:03}'.encode() for k in range(530)]
  assert all(parts)


def test_the_examples_are_written_as_seqio_writes_them(store):
  found = task(store)
  rows = list(found.preprocess_precache(found.source.get_dataset('test', shuffle=False)).take(9).as_numpy_iterator())
  assert [caching.tf_example(row) for row in rows] == [seqio.dict_to_tfexample(row) for row in rows]


def test_the_same_again_does_nothing_and_another_one_is_refused(store, small):
  again = lambda out='cache', **options: caching.cache(
      small / 'data' / NAME, small / out, **{'vocabulary': store / 'vocabulary.json', **options})
  made = again()
  times = {path.name: path.stat().st_mtime_ns for path in (small / 'cache' / NAME).iterdir()}
  assert again() == made | {'cached': False}
  for changed in ({'targets': 'all'}, {'vocabulary': store / 'other.json'}, {'template': ItemTemplate(fields=('title',))}):
    with pytest.raises(UserError, match='cache/shop: the output is already in use'):
      again(**changed)
  assert times == {path.name: path.stat().st_mtime_ns for path in (small / 'cache' / NAME).iterdir()}
  again('another')
  folders = small / 'cache' / NAME, small / 'another' / NAME
  assert filecmp.cmpfiles(*folders, list(times), shallow=False)[0] == list(times)


@pytest.mark.parametrize('changed, word', [
    ({'targets': 'all'}, 'targets'), ({'vocabulary': 'other'}, 'vocabulary'),
    ({'template': ItemTemplate(unknown='skip')}, 'unknown')])
def test_a_cache_of_other_examples_is_not_read(store, small, changed, word):
  caching.cache(small / 'data' / NAME, small / 'cache', vocabulary=store / 'vocabulary.json')
  seqio.add_global_cache_dirs([str(small / 'cache')])
  found = task(store, small, **changed)
  with pytest.raises(UserError, match=f"cache of 'shop' was made with another {word}; make one with `calrec cache`"):
    examples(found, 'test', True)
  assert examples(found, 'test', False)


def test_a_cache_of_changed_histories_is_not_read(store, small):
  caching.cache(small / 'data' / NAME, small / 'cache', vocabulary=store / 'vocabulary.json')
  seqio.add_global_cache_dirs([str(small / 'cache')])
  found = task(store)
  with pytest.raises(UserError, match='another histories'):
    examples(found, 'test', True)


def test_a_cache_on_a_full_disk_is_told_and_leaves_nothing(store, small, monkeypatch):
  def full(path):
    pathlib.Path(path).write_bytes(b'half')
    return writer('/dev/full')

  writer = caching.tf.io.TFRecordWriter
  monkeypatch.setattr(caching.tf.io, 'TFRecordWriter', full)
  with pytest.raises(UserError, match=r'train.tfrecord-00000-of-00001: cannot be written \(.*No space left'):
    caching.cache(small / 'data' / NAME, small / 'cache', vocabulary=store / 'vocabulary.json')
  assert not list((small / 'cache').iterdir())


def test_a_worker_refuses_another_data_set(store, small, monkeypatch):
  folder = small / 'data' / NAME

  def replaced(work, parts, **_):
    for file in folder.iterdir():
      file.unlink()
    histories_lib.write(folder, tiny.make_histories(NAME, users=6), {})
    work(parts[0])

  monkeypatch.setattr(workers, 'run', replaced)
  with pytest.raises(UserError, match='others for this worker'):
    caching.cache(folder, small / 'cache', vocabulary=store / 'vocabulary.json', beam=[])
  assert not list((small / 'cache').iterdir())


def test_without_beam_the_extra_is_named(store, small, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(UserError, match=r'install calrec_jax\[beam\]'):
    caching.cache(small / 'data' / NAME, small / 'cache', vocabulary=store / 'vocabulary.json', beam=['--runner=FnApiRunner'])


def test_the_number_of_files_follows_from_the_texts(store, small, monkeypatch):
  asked = []
  monkeypatch.setattr(cache_layout, 'n_shards', lambda *given: asked.append(given) or 3)
  for targets in ('last', 'all'):
    source = task(store, small, targets=targets).source
    for split in ('train', 'validation', 'test'):
      texts = [row['item_texts'] for row in source.get_dataset(split, shuffle=False).as_numpy_iterator()]
      assert len(source.list_shards(split)) == 3
      assert asked[-1] == (sum(len(text) for row in texts for text in row), len(texts))


@pytest.mark.parametrize('name, message', [('no such', "'no such'"), ('nowhere', 'nowhere: the data set .* is not there')])
def test_a_wrong_folder_is_refused(store, small, name, message):
  if name == 'no such':
    (small / 'data' / NAME).rename(small / 'data' / name)
  with pytest.raises(UserError, match=message):
    caching.cache(small / 'data' / name, small / 'cache', vocabulary=store / 'vocabulary.json')
  assert not (small / 'cache').exists()
