"""The TFDS view cut into shards beforehand: the files that TFDS writes itself, whoever writes them."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core.utils import shard_utils
from tfds_files import files, prepare, write_toy

from calrec_jax.data import histories as histories_lib
from calrec_jax.data import tfds_shards, workers
from calrec_jax.data.histories import FIELDS, Histories
from calrec_jax.data.tfds_builder import SPLITS, PurchaseHistories
from calrec_jax.errors import UserError

FEATURES = tfds.features.FeaturesDict({'user_id': tfds.features.Text(), 'items': tfds.features.Sequence(
    {field: tfds.features.Text() for field in ('item_id', *FIELDS)})})
TEXTS = st.text(max_size=12) | st.text(min_size=120, max_size=140) | st.sampled_from(['', 'é' * 70, '🎁' * 5000])


@pytest.fixture
def in_turn(monkeypatch):
  """Parts are worked on here, without Beam; returns the list of those that were."""
  done = []
  monkeypatch.setattr(workers, 'run', lambda work, parts, **_: [(work(part), done.append(part)) for part in parts])
  return done


@pytest.mark.parametrize('config', [{}, {'num_shards': 4}, {'max_examples_per_split': 7, 'num_shards': 2}])
def test_the_shards_are_those_of_tfds(tmp_path, in_turn, config):
  write_toy(tmp_path / 'toy', users=60)
  plain = prepare(tmp_path / 'toy', tmp_path / 'plain', **config)
  assert not in_turn
  sharded = prepare(tmp_path / 'toy', tmp_path / 'sharded', beam_runner='FnApiRunner', **config)
  n_shards = config.get('num_shards', 1)
  assert files(sharded) == files(plain) and len(files(plain)) == len(in_turn) == len(SPLITS) * n_shards
  for split in SPLITS:
    found, expected = sharded.info.splits[split], plain.info.splits[split]
    assert (found.shard_lengths, found.num_bytes) == (expected.shard_lengths, expected.num_bytes)
    assert max(found.shard_lengths) - min(found.shard_lengths) <= 1
    orders = [[row['user_id'] for row in tfds.as_numpy(builder.as_dataset(split=split))] for builder in (sharded, plain)]
    assert orders[0] == orders[1] != sorted(orders[0])


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=5, unique=True).flatmap(lambda texts: st.tuples(
    st.just(texts), st.lists(st.integers(0, len(texts) - 1), min_size=2, max_size=300))))
def test_the_size_is_known_before_anything_is_written(drawn):
  texts, events = drawn
  items = [dict.fromkeys(FIELDS, text) | {'price': ''} for text in texts]
  data = Histories('toy', ['u' + texts[0]], texts, items, np.array([0, len(events)]), np.array(events, np.int32))
  found = tfds_shards.example_bytes(data, np.array([0]), 'test')
  assert found.tolist() == [len(FEATURES.serialize_example(tfds_shards.example(data, 0, 'test')))]


def test_more_bytes_are_more_shards(tmp_path):
  write_toy(tmp_path / 'toy', users=60)
  builder = PurchaseHistories(folder=tmp_path / 'toy', data_dir=tmp_path / 'tfds')
  data = histories_lib.load(tmp_path / 'toy')
  template = builder._get_filename_template(split_name='test')

  class Small(shard_utils.ShardConfig):
    min_shard_size, max_shard_size = 1000, 4000

  shards, n_bytes = tfds_shards.plan(tmp_path / 'toy', data, 'test', config=Small(), template=template)
  assert len(shards) > 1 and 1000 <= n_bytes / len(shards) <= 4000
  lengths = [shard.end - shard.first for shard in shards]
  assert sum(lengths) == 60 and max(lengths) - min(lengths) <= 1


def test_more_shards_than_users_are_refused(tmp_path, in_turn):
  write_toy(tmp_path / 'toy', users=5)
  with pytest.raises(UserError, match="5 users have a target in the split 'train', which cannot be 6 shards"):
    prepare(tmp_path / 'toy', tmp_path / 'tfds', beam_runner='FnApiRunner', num_shards=6)
  assert not in_turn


def test_a_worker_refuses_another_data_set(tmp_path, monkeypatch):
  write_toy(tmp_path / 'toy', users=5)

  def replaced(work, parts, **_):
    for file in (tmp_path / 'toy').iterdir():
      file.unlink()
    histories_lib.write(tmp_path / 'toy', tiny.make_histories('toy', users=6), {})
    work(parts[0])

  monkeypatch.setattr(workers, 'run', replaced)
  with pytest.raises(UserError, match='toy: is another data set for this worker'):
    prepare(tmp_path / 'toy', tmp_path / 'tfds', beam_runner='FnApiRunner')


def test_without_beam_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  write_toy(tmp_path / 'toy', users=5)
  with pytest.raises(UserError, match=r'install calrec_jax\[beam\]'):
    prepare(tmp_path / 'toy', tmp_path / 'tfds', beam_runner='FnApiRunner')
  assert files(prepare(tmp_path / 'toy', tmp_path / 'tfds'))
