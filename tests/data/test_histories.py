"""The histories folder: what is written comes back, and what is wrong is named."""

import dataclasses
import gzip
import json
import os

import duckdb
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from calrec_jax.data import describe, histories, time_order
from calrec_jax.errors import UserError

SPLITS = ('train', 'validation', 'test')
ITEMS = [
    {'item_id': 'b', 'title': 'Tom &amp; Jerry\n', 'category': ['TV', 'Cartoons &amp; Co'], 'brand': None,
     'price': '$5.00'},
    {'item_id': 'ä', 'title': 'Ömer', 'category': 'TV > Drama', 'brand': 'X', 'price': ''},
    {'item_id': 'c', 'title': 'Ömer', 'category': 'TV > Drama', 'brand': 'X'},
    {'item_id': 'unsold'},
]
SEQUENCES = [
    {'user_id': 'u2', 'item_ids': ['b', 'ä', 'b', 'c'], 'timestamps': [1, 1, 5, 9]},
    {'user_id': 'short', 'item_ids': ['b', 'c'], 'timestamps': [3, 4]},
    {'user_id': 'u1', 'item_ids': ['c', 'c', 'c'], 'timestamps': [-7, 0, 0]},
]


def write_lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def put(folder, sequences=SEQUENCES, items=ITEMS):
  """Writes the two files of a folder of one's own, without dataset.json."""
  folder.mkdir(exist_ok=True)
  return write_lines(folder / 'sequences.jsonl', sequences), write_lines(folder / 'items.jsonl', items)


def prepare(tmp_path, sequences=SEQUENCES, items=ITEMS, **options):
  return histories.prepare(*put(tmp_path / 'own', sequences, items), name='mine', out=tmp_path / 'out', **options)


def without_times(rows):
  return [{key: value for key, value in row.items() if key != 'timestamps'} for row in rows]


def test_prepared_histories_come_back(tmp_path):
  prepare(tmp_path)
  data = histories.load(tmp_path / 'out')
  assert (data.name, data.user_ids, data.item_ids) == ('mine', ['u2', 'u1'], ['b', 'ä', 'c', 'unsold'])
  assert data.items == [
      {'title': 'Tom & Jerry', 'category': 'TV, Cartoons & Co', 'brand': '', 'price': '$5.00'},
      {'title': 'Ömer', 'category': 'TV > Drama', 'brand': 'X', 'price': ''},
      {'title': 'Ömer', 'category': 'TV > Drama', 'brand': 'X', 'price': ''},
      {'title': '', 'category': '', 'brand': '', 'price': ''}]
  np.testing.assert_array_equal(data.history(0), [0, 1, 0, 2])
  np.testing.assert_array_equal(data.history(1), [2, 2, 2])
  np.testing.assert_array_equal(data.timestamps, [1, 1, 5, 9, -7, 0, 0])
  assert (data.offsets.dtype, data.events.dtype, data.timestamps.dtype) == (np.int64, np.int32, np.int64)
  assert sorted(os.listdir(tmp_path / 'out')) == ['dataset.json', 'items.jsonl.gz', 'sequences.jsonl.gz']


def test_the_description_tells_what_was_read_dropped_and_left(tmp_path):
  description = prepare(tmp_path)
  assert description == json.loads((tmp_path / 'out/dataset.json').read_text())
  assert description['steps'] == [
      {'step': 'read', 'dropped': 0, 'events': 9, 'users': 3, 'items': 4},
      {'step': 'histories shorter than 3', 'dropped': 2, 'events': 7, 'users': 2, 'items': 4}]
  assert description['statistics'] == {
      'users': 2, 'items': 4, 'events': 7, 'length': {'mean': 3.5, 'min': 3, 'max': 4},
      'unknown': {'title': 0.25, 'category': 0.25, 'brand': 0.5, 'price': 0.75},
      'items_with_duplicate_text': 2, 'last_repeats_previous': 0.5}
  assert [source['lines'] for source in description['sources']] == [3, 4]
  assert str(tmp_path) not in json.dumps(description)
  printed = describe.format_description(description)
  for told in ('mine', 'sequences.jsonl', 'histories shorter than 3', 'title 25.0%', 'mean 3.50, 3 to 4', '50.0%',
               description['fingerprint']):
    assert told in printed


def test_the_same_input_gives_the_same_bytes(tmp_path):
  for name in ('one', 'two'):
    (tmp_path / name).mkdir()
    prepare(tmp_path / name)
  for name in os.listdir(tmp_path / 'one/out'):
    assert (tmp_path / 'one/out' / name).read_bytes() == (tmp_path / 'two/out' / name).read_bytes()


def to_parquet(path, out):
  columns = {'sequences': "{'user_id': 'VARCHAR', 'item_ids': 'VARCHAR[]', 'timestamps': 'BIGINT[]'}",
             'items': str(dict.fromkeys(('item_id', *histories.FIELDS), 'VARCHAR'))}[path.stem]
  duckdb.execute(f"COPY (SELECT * FROM read_json('{path}', columns={columns})) TO '{out / path.stem}.parquet'")


@pytest.mark.parametrize('with_times', [True, False])
def test_the_fingerprint_is_of_the_content_not_of_the_form(tmp_path, with_times):
  plain = put(tmp_path / 'plain', SEQUENCES if with_times else without_times(SEQUENCES),
              [item | {'category': 'TV'} for item in ITEMS])
  (tmp_path / 'zipped').mkdir()
  (tmp_path / 'table').mkdir()
  for path in plain:
    (tmp_path / 'zipped' / f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
    to_parquet(path, tmp_path / 'table')
  loaded = [histories.load(tmp_path / name) for name in ('plain', 'zipped', 'table')]
  assert [data.name for data in loaded] == ['plain', 'zipped', 'table']  # no dataset.json: the folder's name
  assert len({data.fingerprint for data in loaded}) == 1
  assert [data.timestamps is None for data in loaded] == [not with_times] * 3


def test_parquet_is_prepared_as_json_lines_are(tmp_path):
  (tmp_path / 'table').mkdir()
  prepare(tmp_path, items=[item | {'category': 'TV'} for item in ITEMS])
  for path in (tmp_path / 'own').iterdir():
    to_parquet(path, tmp_path / 'table')
  description = histories.prepare(tmp_path / 'table/sequences.parquet', tmp_path / 'table/items.parquet', name='other',
                                  out=tmp_path / 'from_table')
  assert description['fingerprint'] == histories.load(tmp_path / 'out').fingerprint
  assert [source['lines'] for source in description['sources']] == [3, 4]


def changes_of(data):
  """Each is `data` with one thing changed."""
  yield dataclasses.replace(data, user_ids=data.user_ids[::-1])
  yield dataclasses.replace(data, item_ids=['x', *data.item_ids[1:]])
  yield dataclasses.replace(data, items=[*data.items[:-1], data.items[-1] | {'brand': 'new'}])
  yield dataclasses.replace(data, events=data.events[::-1])
  yield dataclasses.replace(data, offsets=np.array([0, 3, 7]))
  yield dataclasses.replace(data, timestamps=data.timestamps + 1)
  yield dataclasses.replace(data, timestamps=None)


def test_the_fingerprint_tells_each_change_but_the_name(tmp_path):
  prepare(tmp_path)
  data = histories.load(tmp_path / 'out')
  prints = [changed.fingerprint for changed in changes_of(data)]
  assert len({data.fingerprint, *prints}) == 1 + len(prints)
  assert dataclasses.replace(data, name='other').fingerprint == data.fingerprint


def test_leave_one_out():
  data = histories.Histories('toy', ['long', 'short'], ['a'], [{}], np.array([0, 5, 6]), np.zeros(6, np.int32))
  assert {split: data.visible(split).tolist() for split in SPLITS} == {'train': [3, 0], 'validation': [4, 0], 'test': [5, 1]}
  assert len(data.seen(0, 'validation')) == 4
  with pytest.raises(ValueError, match="'tset'"):
    data.visible('tset')


@hypothesis.given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_split_by_time_sees_nothing_of_a_later_period(lengths, seed):
  rng = np.random.default_rng(seed)
  offsets = np.cumsum([0, *lengths])
  times = np.concatenate([np.sort(rng.integers(0, 9, n)) for n in lengths]).astype(np.int64)
  data = histories.Histories('toy', [str(n) for n in range(len(lengths))], [str(n) for n in range(offsets[-1])],
                             [{}] * int(offsets[-1]), offsets, np.arange(offsets[-1], dtype=np.int32), times, cutoffs=(3, 6))
  for user in range(len(lengths)):
    events, periods = data.history(user), np.searchsorted([3, 6], times[offsets[user]:offsets[user + 1]], side='right')
    assert data.seen(user, 'train').tolist() == events[periods == 0].tolist()
    for period, split in ((1, 'validation'), (2, 'test')):
      expected = [*events[periods < period], *events[periods == period][:1]] if (periods == period).any() else []
      assert data.seen(user, split).tolist() == expected


def test_hashed_ties_are_those_of_the_dumps_and_need_times(tmp_path):
  prepare(tmp_path, ties='hashed')
  data = histories.load(tmp_path / 'out')
  order = sorted('bä', key=lambda item: time_order.tie_hash('u2', item))
  assert [data.item_ids[item] for item in data.history(0)] == [*order, 'b', 'c']
  (tmp_path / 'none').mkdir()
  for options in ({'ties': 'hashed'}, {'split': 'time'}):
    with pytest.raises(UserError, match='no timestamps'):
      prepare(tmp_path / 'none', [{'user_id': 'u', 'item_ids': ['b', 'c', 'b']}], **options)


def test_whole_numbers_serve_as_ids(tmp_path):
  prepare(tmp_path, [{'user_id': 7, 'item_ids': [1, 2, 1]}], [{'item_id': 1, 'title': 5}, {'item_id': '2'}])
  data = histories.load(tmp_path / 'out')
  assert (data.user_ids, data.item_ids, data.items[0]['title'], data.timestamps) == (['7'], ['1', '2'], '5', None)


def test_ids_that_differ_by_case_or_blanks_are_different_and_told(tmp_path):
  rows = [{'user_id': user, 'item_ids': ['a', 'A', ' a', 'b']} for user in ('ann', 'Ann', 'bob')]
  items = [{'item_id': item} for item in ('a', 'A', ' a', 'b', 'B\t')]  # the last one is in no history
  description = prepare(tmp_path, rows, items)
  assert description['statistics']['items'] == 5 and description['similar_ids'] == {'users': 2, 'items': 5}
  assert '2 users differ from another one only by case or blanks' in describe.format_description(description)
  (tmp_path / 'other').mkdir()
  assert 'similar_ids' not in prepare(tmp_path / 'other')


USER = {'user_id': 'v', 'item_ids': ['b', 'b', 'b'], 'timestamps': [1, 2, 3]}


@pytest.mark.parametrize('row, told', [
    (USER | {'item_ids': ['b', 'nope', 'c']}, r"line 4: user 'v' has the unknown item 'nope'"),
    (USER | {'item_ids': ['nope'], 'timestamps': [1]}, r"line 4: user 'v' has the unknown item 'nope'"),
    (USER | {'user_id': 'u2'}, r"line 4: user 'u2' is already in line 1"),
    (USER | {'timestamps': None}, r'line 4: "timestamps" must be in all lines or in none'),
    (USER | {'timestamps': [1, 2]}, r'line 4: "timestamps" is no list of whole seconds'),
    (USER | {'timestamps': [1, 2, 2.5]}, r'line 4: "timestamps" is no list of whole seconds'),
    (USER | {'timestamps': [1, 2, 2**63]}, r'line 4: "timestamps" is no list of whole seconds'),
    (USER | {'timestamps': [1, 3, 2]}, r'line 4: "timestamps" go back in time'),
    (USER | {'timestamps': [1, 2, 1_600_000_000_000]}, r'line 4: "timestamps" holds 1600000000000, .*divide milliseconds'),
    (USER | {'timestamps': ['2014-01-01'] * 3}, r'line 4: "timestamps" is no list of whole seconds'),
    ({'item_ids': ['b']}, r'line 4: "user_id" is missing'),
    (USER | {'user_id': ''}, r'line 4: "user_id" is missing'),
    ({'user_id': 'v'}, r'line 4: "item_ids" is missing'),
    (USER | {'item_ids': 'bbb'}, r'line 4: "item_ids" is missing, or no list'),
    (USER | {'item_ids': ['b', None, 'b']}, r'line 4: "item_ids" is missing, or no list'),
    ('no object', r'line 4: a JSON str'),
])
def test_a_bad_history_is_named_and_nothing_is_written(tmp_path, row, told):
  with pytest.raises(UserError, match=r'sequences\.jsonl: ' + told):
    prepare(tmp_path, [*SEQUENCES, row])
  assert os.listdir(tmp_path) == ['own']
  with pytest.raises(UserError, match=told) as error:
    histories.load(tmp_path / 'own')
  assert '--max_bad_lines' not in str(error.value)  # `load` has no such option


@pytest.mark.parametrize('items, told', [
    ([*ITEMS, {'item_id': 'c'}], r"line 5: item 'c' is listed a second time"),
    ([*ITEMS, {'title': 'c'}], r'line 5: "item_id" is None'),
    ([*ITEMS, 7], r'line 5: a JSON int'),
    ([], 'lists no item'),
])
def test_a_bad_item_is_named(tmp_path, items, told):
  with pytest.raises(UserError, match=r'items\.jsonl: ' + told):
    prepare(tmp_path, items=items)


def test_tolerated_bad_lines_are_left_out_and_counted(tmp_path):
  bad = [*SEQUENCES, 'x', {'user_id': 'v'}]
  description = prepare(tmp_path, bad, [*ITEMS, []], max_bad_lines=2)
  assert description['bad_lines'] == {'sequences': 2, 'items': 1}
  assert description['statistics']['users'] == 2
  with pytest.raises(UserError, match=r'line 5: .*2 bad lines up to here, 1 tolerated'):
    histories.prepare(*put(tmp_path / 'own', bad), name='x', out=tmp_path / 'x', max_bad_lines=1)


def test_nothing_left_is_an_error_that_names_the_filter(tmp_path):
  with pytest.raises(UserError, match=r'nothing is left: none of its 3 histories has 5 events .*\(--min_length\)'):
    prepare(tmp_path, min_length=5)


@pytest.mark.parametrize('name', ['', 'a/b', '../x', 'a b', '-x', 'ä'])
def test_a_name_must_do_for_folders_and_tasks(tmp_path, name):
  with pytest.raises(UserError, match='cannot name a data set'):
    histories.prepare(*put(tmp_path / 'own'), name=name, out=tmp_path / 'out')


def test_an_output_in_use_is_left_alone(tmp_path):
  prepare(tmp_path)
  before = (tmp_path / 'out/dataset.json').read_bytes()
  with pytest.raises(UserError, match='already in use'):
    prepare(tmp_path, min_length=2)
  assert (tmp_path / 'out/dataset.json').read_bytes() == before


class TestBadFolders:

  @pytest.fixture
  def folder(self, tmp_path):
    prepare(tmp_path)
    return tmp_path / 'out'

  def told(self, folder, what):
    with pytest.raises(UserError, match=what):
      histories.load(folder)

  def test_missing_folder(self, tmp_path):
    self.told(tmp_path / 'nowhere', 'no such folder')

  def test_missing_file(self, folder):
    (folder / 'items.jsonl.gz').unlink()
    self.told(folder, r'holds no items\.jsonl\.gz')

  def test_two_files_for_one(self, folder):
    (folder / 'items.jsonl').write_text('')
    self.told(folder, r'holds items\.jsonl\.gz and items\.jsonl;')

  def test_truncated_file(self, folder):
    path = folder / 'sequences.jsonl.gz'
    path.write_bytes(path.read_bytes()[:-9])
    self.told(folder, r'sequences\.jsonl\.gz: is truncated')

  def test_no_parquet(self, folder):
    (folder / 'items.jsonl.gz').rename(folder / 'items.parquet')
    self.told(folder, r'items\.parquet: not a Parquet file')

  @pytest.mark.parametrize('text', ['{', '[]', '{"name": 5}', '\xff'])
  def test_broken_description(self, folder, text):
    (folder / 'dataset.json').write_text(text, encoding='latin-1')
    self.told(folder, r'dataset\.json: ')

  def test_content_changed_after_it_was_described(self, folder):
    path = folder / 'items.jsonl.gz'
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b'Jerry', b'Jenny')))
    self.told(folder, 'is not what its dataset.json describes')


@pytest.mark.parametrize('name, users, items, events', [
    ('scientific2018', 8_442, 4_385, 59_384), ('games2018', 50_546, 16_859, 452_989),
    ('office2014', 4_905, 2_420, 53_258)])
def test_real_histories_are_read_whole(real_data, tmp_path, name, users, items, events):
  folder = real_data / 'histories' / name
  description = histories.prepare(folder / 'sequences.jsonl.gz', folder / 'items.jsonl.gz', name=name,
                                  out=tmp_path / name)
  stats = description['statistics']
  assert (stats['users'], stats['items'], stats['events']) == (users, items, events)
  assert histories.load(folder).fingerprint == description['fingerprint']
