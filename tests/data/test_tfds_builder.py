"""The TFDS dataset is a view of the histories folder: the same events, the same splits, no download."""

import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import FIELDS, Histories
from calrec_jax.data.tfds_builder import SPLITS, PurchaseHistories, visible_histories
from calrec_jax.errors import UserError

LENGTHS = [3, 6, 2, 4]


def _store(folder, title='Cup'):
  items = [{'title': f'{title} {n} é', 'category': 'Kitchen', 'brand': '' if n % 2 else 'Acme', 'price': ''}
           for n in range(5)]
  events = np.random.default_rng(0).integers(0, 5, sum(LENGTHS)).astype(np.int32)
  histories = Histories('toy-set', [f'u{n}' for n in range(4)], list('abcde'), items,
                        np.cumsum([0, *LENGTHS], dtype=np.int64), events)
  folder.mkdir()
  histories_lib.write(folder, histories, {})
  return histories


def test_each_user_with_a_target_is_seen_up_to_the_split(tmp_path):
  histories = _store(tmp_path / 'toy')
  for split, users in {'train': [1, 3], 'validation': [0, 1, 3], 'test': [0, 1, 2, 3]}.items():
    seen = dict(visible_histories(histories, split))
    assert list(seen) == users
    for user, events in seen.items():
      np.testing.assert_array_equal(events, histories.seen(user, split))


def test_the_dataset_holds_what_the_folder_holds(tmp_path, monkeypatch):
  histories = _store(tmp_path / 'toy')

  def refuse(*_):
    raise AssertionError('a TFDS builder of local files went to the network')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  builder = PurchaseHistories(folder=tmp_path / 'toy', data_dir=tmp_path / 'tfds')
  builder.download_and_prepare()
  for split in SPLITS:
    found = {}
    for example in tfds.as_numpy(builder.as_dataset(split=split)):
      columns = {name: [text.decode() for text in texts] for name, texts in example['items'].items()}
      found[example['user_id'].decode()] = columns
    expected = {
        histories.user_ids[user]: {'item_id': [histories.item_ids[i] for i in events],
                                   **{field: [histories.items[i][field] for i in events] for field in FIELDS}}
        for user, events in visible_histories(histories, split)}
    assert found == expected
    assert builder.info.splits[split].num_examples == len(expected)


def test_a_changed_folder_is_another_dataset(tmp_path):
  _store(tmp_path / 'a')
  _store(tmp_path / 'b', title='Plate')
  (tmp_path / 'c').mkdir()
  a, b = (PurchaseHistories(folder=tmp_path / name, data_dir=tmp_path / 'tfds') for name in 'ab')
  assert a.data_path != b.data_path
  by_name = tfds.builder('purchase_histories', folder=tmp_path / 'a', data_dir=tmp_path / 'tfds')
  assert by_name.data_path == a.data_path


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(UserError, match='nowhere'):
    PurchaseHistories(folder=tmp_path / 'nowhere', data_dir=tmp_path / 'tfds')
