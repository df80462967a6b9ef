"""Law 11: DuckDB's histories are a plain Python loop's. Bad dumps are named, and nothing is half-written."""

import collections
import gzip
import hashlib
import json
import os
import pathlib
import tempfile

import duckdb
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from calrec_jax.data import amazon, describe, dump_tables, filtering, histories, time_order
from calrec_jax.errors import UserError


def plain_histories(paths, *, min_count, min_length, ties='dump'):
  """The law's other side: {user: [(item, time), …]}, written as one would say it."""
  events = []
  for path in paths:
    with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
      for line in file:
        try:
          row = json.loads(line)
          event = row['reviewerID'], row['asin'], row['unixReviewTime']
        except (ValueError, TypeError, KeyError):
          continue
        if all(type(value) is kind and value != '' for value, kind in zip(event, (str, str, int), strict=True)):
          events.append(event)
  while True:
    n_of_user = collections.Counter(user for user, _, _ in events)
    n_of_item = collections.Counter(item for _, item, _ in events)
    kept = [event for event in events if n_of_user[event[0]] >= min_count and n_of_item[event[1]] >= min_count]
    if len(kept) == len(events):
      break
    events = kept
  of_user = collections.defaultdict(list)
  def order(event):  # stable: ties stay in the order of the lines
    return event[2], hashlib.md5(f'{event[0]}\n{event[1]}'.encode()).hexdigest()[:16] if ties == 'hashed' else ''
  for user, item, time in sorted(events, key=order):
    if not of_user[user] or of_user[user][-1][0] != item:
      of_user[user].append((item, time))
  return {user: history for user, history in sorted(of_user.items()) if len(history) >= min_length}


def as_plain(data):
  times = data.timestamps.tolist()
  return {user_id: [(data.item_ids[item], time) for item, time in
                    zip(data.history(user), times[data.offsets[user]:data.offsets[user + 1]], strict=True)]
          for user, user_id in enumerate(data.user_ids)}


def check_law(paths, *, min_count=5, min_length=3, max_bad_lines=0, ties='dump'):
  """Asserts law 11 on these review files."""
  expected = plain_histories(paths, min_count=min_count, min_length=min_length, ties=ties)
  with tempfile.TemporaryDirectory() as folder:
    options = {'min_count': min_count, 'min_length': min_length, 'max_bad_lines': max_bad_lines, 'ties': ties,
               'progress': False}
    if not expected:
      with pytest.raises(UserError, match='Nothing is left'):
        amazon.prepare_dumps(paths, name='law', out=f'{folder}/out', **options)
      return
    description = amazon.prepare_dumps(paths, name='law', out=f'{folder}/out', **options)
    data = histories.load(f'{folder}/out')
  found = as_plain(data)
  assert found == expected
  assert list(found) == list(expected)  # users by id
  assert data.item_ids == sorted({item for history in expected.values() for item, _ in history})
  assert description['steps'][-1]['events'] == sum(map(len, expected.values()))


def review(user, item, time, **more):
  text = 'a, "b"\nc\u2028'
  return {'overall': 5.0, 'reviewerID': user, 'asin': item, 'unixReviewTime': time, 'reviewText': text, **more}


def write_lines(path, rows):
  """Writes rows as JSON lines; a row of bytes as it is."""
  content = b'\n'.join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b'\n'
  path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
  return path


def random_dump(seed, *, n_events=600, n_users=40, n_items=25, n_days=6):
  """Reviews with many ties and repeats, some users and items of which fall out of the 5-core only in later rounds."""
  rng = np.random.default_rng(seed)
  user, item = np.minimum(rng.geometric(0.06, (2, n_events)), [[n_users], [n_items]])
  few = rng.random(n_events) < 0.3
  user[few], item[few] = rng.integers([[50], [50]], [[90], [90]], (2, few.sum()))
  # Item ids do not grow with the lines, so that ties in the order of ids are not ties in the order of lines.
  return [review(f'U{u}', f'B{i * 7919 % 97:02}', int(day) * 86_400) for u, i, day in
          zip(user, item, rng.integers(n_days, size=n_events), strict=True)]


REAL = ['Gift_Cards', 'Magazine_Subscriptions', 'All_Beauty']


@pytest.mark.parametrize('ties', time_order.TIES)
@pytest.mark.parametrize('name', REAL)
def test_law_11_on_real_dumps(real_data, name, ties):
  check_law([real_data / f'amazon2018_raw/{name}_5.json.gz'], ties=ties)


@pytest.mark.parametrize('min_count, min_length', [(5, 3), (1, 1), (8, 6), (60, 3)])
def test_law_11_on_random_dumps(tmp_path, min_count, min_length):
  one = write_lines(tmp_path / 'one.json.gz', random_dump(0))
  two = write_lines(tmp_path / 'two.json', random_dump(1, n_events=200))
  check_law([one, two], min_count=min_count, min_length=min_length)
  check_law([two, one], min_count=min_count, min_length=min_length, ties='hashed')


IDS = strategies.sampled_from(['a', 'b', 'B', 'é', 'e\u0301', '\U0001f381', '\uffee', ' ', '"', "'", '\\u0000', 'a\nb'])
ROWS = strategies.builds(review, IDS, IDS, strategies.integers(-2, 2))
ODD = strategies.sampled_from([
    b'', b'  ', b'{', b'null', b'[1]', b'{}', b'\xff', b'{"a": 1} {"b": 2}', b'{"a":\n1}',
    review('a', 'b', 1, nested={'asin': 'c'}, reviewerid='x')]) | strategies.builds(
    review, IDS | strategies.sampled_from(['', None, 3, ['a']]), IDS | strategies.none(),
    strategies.sampled_from([1, 1.5, 2.0, '1', None, True, -2**62]))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(strategies.lists(ROWS, max_size=40), strategies.lists(ODD, max_size=3), strategies.integers(1, 3),
                  strategies.integers(1, 3), strategies.sampled_from(time_order.TIES),
                  strategies.randoms(use_true_random=False))
def test_law_11_on_any_small_dump(rows, odd, min_count, min_length, ties, random):
  rows = rows + odd
  random.shuffle(rows)
  with tempfile.TemporaryDirectory() as folder:
    path = write_lines(pathlib.Path(folder) / 'x.json.gz', rows)
    check_law([path], min_count=min_count, min_length=min_length, max_bad_lines=100, ties=ties)


def ties_by_item(monkeypatch):
  monkeypatch.setitem(filtering.EVENT_ORDERS, 'dump', 'time, item')


def repeats_dropped_before_the_k_core(monkeypatch):
  k_core = filtering.k_core

  def mutant(connection, min_count):
    connection.execute("""
        CREATE OR REPLACE TABLE events AS SELECT user, item, time, line FROM (
          SELECT *, lag(item) OVER (PARTITION BY user ORDER BY time, line) AS previous FROM events)
        WHERE previous IS DISTINCT FROM item""")
    k_core(connection, min_count)
  monkeypatch.setattr(filtering, 'k_core', mutant)


def one_round_of_the_k_core(monkeypatch):
  def mutant(connection, min_count):
    for what in ('user', 'item'):
      connection.execute(f"""
          DELETE FROM events
          WHERE {what} IN (SELECT {what} FROM events GROUP BY {what} HAVING count(*) < {min_count})""")
  monkeypatch.setattr(filtering, 'k_core', mutant)


def all_repeats_dropped(monkeypatch):
  def mutant(connection, ties, dedup):
    connection.execute("""
        CREATE TABLE histories AS SELECT user, item, min(time) AS time, min(time) AS rank FROM events
        GROUP BY user, item""")
  monkeypatch.setattr(filtering, 'drop_repeats', mutant)


@pytest.mark.parametrize('mutate', [ties_by_item, repeats_dropped_before_the_k_core, one_round_of_the_k_core,
                                    all_repeats_dropped])
def test_law_11_fails_on_mutants(tmp_path, monkeypatch, mutate):
  path = write_lines(tmp_path / 'x.json.gz', random_dump(2))
  check_law([path])
  mutate(monkeypatch)
  with pytest.raises(AssertionError):
    check_law([path])


@pytest.mark.parametrize('mutate', [ties_by_item, repeats_dropped_before_the_k_core])
def test_law_11_fails_on_mutants_on_a_real_dump(real_data, monkeypatch, mutate):
  mutate(monkeypatch)
  with pytest.raises(AssertionError):
    check_law([real_data / 'amazon2018_raw/All_Beauty_5.json.gz'])


def test_lines_keep_their_order_in_a_file_that_is_read_in_parallel(tmp_path):
  """DuckDB cuts a plain file into parts of 32 MiB; here all of a user's events share one time.

  With `preserve_insertion_order = false` this was seen to fail (two cores, from 420,000 lines on).
  """
  rng = np.random.default_rng(0)
  users, items = rng.integers([[5_000], [997]], size=(2, 420_000)).tolist()
  path, padding = tmp_path / 'x.json', 'x' * 170
  path.write_text(''.join(
      f'{{"reviewText": "{padding}", "reviewerID": "U{user}", "asin": "B{item}", "unixReviewTime": 0}}\n'
      for user, item in zip(users, items, strict=True)))
  assert path.stat().st_size > 3 * 2**25
  check_law([path])


def test_a_file_read_in_python_gives_what_duckdb_reads(tmp_path, monkeypatch):
  reviews = write_lines(tmp_path / 'x.json.gz', random_dump(3))
  meta = write_lines(tmp_path / 'meta.json.gz', [
      {'asin': f'B{n:02}', 'title': f'T {n}', 'category': ['C'], 'price': n + 1} for n in range(90)])
  prints = [amazon.prepare_dumps([reviews], [meta], name='x', out=tmp_path / 'duckdb')['fingerprint']]
  monkeypatch.setattr(dump_tables.Dumps, '_count_good', lambda *_: -1)
  prints += [amazon.prepare_dumps([reviews], [meta], name='x', out=tmp_path / 'python')['fingerprint']]
  assert prints[0] == prints[1]


@pytest.mark.parametrize('value', [
    '1e9', '1400000000.0', '-0', '-5', '0', '"1400000000"', 'true', 'null', '9223372036854775807', '9223372036854775808',
    '99999999999', '[1]', '{}'])
def test_a_time_counts_if_it_is_a_whole_number_to_python(tmp_path, value):
  """DuckDB reads texts of numbers; what it does not take as such, Python judges."""
  check_odd_line(tmp_path, f'{{"reviewerID": "U1", "asin": "B1", "unixReviewTime": {value}}}')


@pytest.mark.parametrize('value', [
    r'"a\"b"', r'"\\"', r'"\u00e9"', r'"\u0000"', r'"\ud83d\ude00"', r'"\ud83d"', '""', '" "', '"é"', '1', 'true', 'null',
    '["a"]', '"\'; DROP"', r'"a\/b"', r'"\n"', '"null"', '"٣"'])
def test_an_id_counts_if_it_is_a_text_to_python(tmp_path, value):
  check_odd_line(tmp_path, f'{{"reviewerID": {value}, "asin": "B1", "unixReviewTime": 1}}')


def check_odd_line(tmp_path, line):
  """Whether the line counts, and as what, is decided as by Python alone."""
  path = tmp_path / 'x.json'
  path.write_text(line + '\n{"reviewerID": "U", "asin": "B", "unixReviewTime": 1}\n', encoding='utf-8')
  found = []
  for in_python in (False, True):
    with pytest.MonkeyPatch.context() as patch:
      if in_python:
        patch.setattr(dump_tables.Dumps, '_count_good', lambda *_: -1)
      try:
        amazon.prepare_dumps([path], name='x', out=tmp_path / str(in_python), min_count=0, min_length=1, max_bad_lines=1)
        found.append(as_plain(histories.load(tmp_path / str(in_python))))
      except UserError as error:
        found.append(str(error))
  assert found[0] == found[1]


@pytest.mark.parametrize('rows', [1, 100, 1 << 25])
def test_the_k_core_is_that_of_counters_however_it_is_read(monkeypatch, rows):
  monkeypatch.setattr(filtering, '_BLOCK_ROWS', rows)
  rng = np.random.default_rng(0)
  events = [(int(user), int(item)) for user, item in zip(60 * rng.random(400) ** 2, 50 * rng.random(400) ** 2, strict=True)]
  with duckdb.connect() as connection:
    connection.execute('CREATE TABLE users AS SELECT range::INTEGER AS code FROM range(60)')
    connection.execute('CREATE TABLE items AS SELECT range::INTEGER AS code FROM range(50)')
    connection.execute('CREATE TABLE events (user INTEGER, item INTEGER)')
    connection.executemany('INSERT INTO events VALUES (?, ?)', [(0, 0)] * 3 + events)
    connection.execute('DELETE FROM events WHERE rowid < 3')
    filtering.k_core(connection, 5)
    found = connection.execute('SELECT * FROM events').fetchall()
  rounds = 0
  while True:
    users, items = (collections.Counter(event[place] for event in events) for place in (0, 1))
    kept = [(user, item) for user, item in events if users[user] >= 5 and items[item] >= 5]
    if kept == events:
      break
    events, rounds = kept, rounds + 1
  assert found == events and rounds > 2 and events


# Items.

def dump(tmp_path, name='x.json.gz', asins=('B1', 'B2', 'B3', 'B4', 'B5'), n_users=5):
  """Each of the users buys each of the asins, in turn."""
  return write_lines(tmp_path / name, [review(f'U{user}', asin, day) for day, asin in enumerate(asins)
                                       for user in range(n_users)])


def items_of(tmp_path, meta_rows, **options):
  meta = write_lines(tmp_path / 'meta.json.gz', meta_rows)
  description = amazon.prepare_dumps([dump(tmp_path)], [meta], name='x', out=tmp_path / 'out', **options)
  data = histories.load(tmp_path / 'out')
  return dict(zip(data.item_ids, data.items, strict=True)), description


def test_metadata_are_joined_and_cleaned(tmp_path):
  items, description = items_of(tmp_path, [
      {'asin': 'B9', 'title': 'never bought'},
      {'asin': 'B2', 'title': 'One &amp; Two', 'category': ['A', 'A', 'B &amp; C'], 'brand': 'by\n    \n    X',
       'price': '$1.99'},
      {'asin': 'B1', 'title': '<span class="a-size-medium a-color-secondary"', 'category': [], 'brand': None,
       'price': '.a-box-inner{background-color:#fff}'},
      {'asin': 'B3'},
      {'asin': 'B4', 'title': ['x'], 'category': 'C', 'brand': 7, 'price': 3.5, 'title2': 'no'},
  ])
  assert items == {
      'B1': {'title': '', 'category': '', 'brand': '', 'price': ''},
      'B2': {'title': 'One & Two', 'category': 'A, B & C', 'brand': 'X', 'price': '$1.99'},
      'B3': {'title': '', 'category': '', 'brand': '', 'price': ''},
      'B4': {'title': '', 'category': 'C', 'brand': '7', 'price': '$3.50'},
      'B5': {'title': '', 'category': '', 'brand': '', 'price': ''}}
  assert description['metadata'] == {'lines': 5, 'repeated_lines': 0, 'items_without': 1}
  assert description['statistics']['unknown']['title'] == 0.8


def test_of_repeated_metadata_the_first_line_with_a_usable_title_counts(tmp_path):
  items, description = items_of(tmp_path, [
      {'asin': 'B1', 'title': '<a', 'brand': 'first'}, {'asin': 'B2', 'title': '', 'brand': 'first'},
      {'asin': 'B1', 'title': 'T', 'brand': 'second'}, {'asin': 'B2', 'title': '<a', 'brand': 'second'},
      {'asin': 'B1', 'title': 'U', 'brand': 'third'}])
  assert (items['B1']['title'], items['B1']['brand']) == ('T', 'second')
  assert (items['B2']['title'], items['B2']['brand']) == ('', 'first')
  assert description['metadata']['repeated_lines'] == 3


def test_metadata_of_several_files_follow_the_order_of_the_files(tmp_path):
  one = write_lines(tmp_path / 'one.json', [{'asin': 'B9', 'title': 'x'}, {'asin': 'B1', 'title': 'one'}])
  two = write_lines(tmp_path / 'two.json', [{'asin': 'B1', 'title': 'two'}])
  for paths, title in (([one, two], 'one'), ([two, one], 'two')):
    amazon.prepare_dumps([dump(tmp_path)], paths, name='x', out=tmp_path / title)
    assert histories.load(tmp_path / title).items[0]['title'] == title


def test_bad_metadata_are_named_or_tolerated(tmp_path):
  rows = [{'asin': 'B1', 'title': 'T'}, {'title': 'no asin'}, b'{"asin": "B2", "title',
          {'asin': 'B2', 'title': '\ud800 T'}]
  with pytest.raises(UserError, match=r'meta\.json\.gz: line 2: "asin" is missing; .*--max_bad_lines'):
    items_of(tmp_path, rows)
  items, description = items_of(tmp_path, rows, max_bad_lines=2)
  assert (items['B1']['title'], items['B2']['title'], description['bad_lines']) == ('T', '? T', 2)


def test_infinite_prices_are_unknown(tmp_path):
  items, _ = items_of(tmp_path, [b'{"asin": "B1", "title": "T", "price": 1e999}', b'{"asin": "B2", "price": NaN}'])
  assert items['B1'] == {'title': 'T', 'category': '', 'brand': '', 'price': ''}


# The description.

def test_the_description_counts_each_step(tmp_path):
  rows = [review(f'U{user}', f'B{item}', item) for user in range(5) for item in range(5)]  # the core
  rows += [review('U0', 'B4', 4)] * 2  # published three times: two consecutive duplicates
  rows += [review('U9', 'B0', 9)] * 6  # a history of one item
  rows += [review('U8', 'B7', 1)]  # falls to the k-core
  path = write_lines(tmp_path / 'x.json', [*rows, b'oops'])
  description = amazon.prepare_dumps([path], name='mine', out=tmp_path / 'out', max_bad_lines=1)
  assert description['steps'] == [
      {'step': 'read', 'dropped': 0, 'events': 34, 'users': 7, 'items': 6},
      {'step': 'k-core, at least 5 events', 'dropped': 1, 'events': 33, 'users': 6, 'items': 5},
      {'step': 'consecutive duplicates', 'dropped': 7, 'events': 26, 'users': 6, 'items': 5},
      {'step': 'histories shorter than 3', 'dropped': 1, 'events': 25, 'users': 5, 'items': 5}]
  assert description['bad_lines'] == 1
  assert description['options'] == {'min_count': 5, 'min_length': 3, 'max_bad_lines': 1, 'ties': 'dump',
                                    'split': 'leave_one_out', 'repeats': 'consecutive ones dropped'}
  assert description['sources'][0]['file'] == 'x.json' and description['sources'][0]['lines'] == 35
  assert description == json.loads((tmp_path / 'out/dataset.json').read_text())
  assert str(tmp_path) not in json.dumps(description)
  assert 'k-core, at least 5 events' in describe.format_description(description)


def test_the_same_dumps_give_the_same_bytes(tmp_path):
  path = write_lines(tmp_path / 'x.json.gz', random_dump(4))
  for out in ('one', 'two'):
    amazon.prepare_dumps([path], name='x', out=tmp_path / out)
  for name in ('sequences.jsonl.gz', 'items.jsonl.gz', 'dataset.json'):
    assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()


# Bad input.

def told(tmp_path, what, reviews, meta=(), **options):
  """Asserts that the error says `what`, and that nothing is left behind."""
  before = sorted(os.listdir(tmp_path))
  with pytest.raises(UserError, match=what):
    amazon.prepare_dumps(reviews, meta, name='x', out=tmp_path / 'out', **options)
  assert sorted(os.listdir(tmp_path)) == before


def test_missing_files(tmp_path):
  told(tmp_path, r'no\.json\.gz: no such file', [dump(tmp_path), tmp_path / 'no.json.gz'])
  told(tmp_path, r'no\.json\.gz: no such file', [dump(tmp_path)], [tmp_path / 'no.json.gz'])
  told(tmp_path, 'No review file', [])


@pytest.mark.parametrize('as_meta', [False, True])
def test_truncated_and_false_gzip(tmp_path, as_meta):
  good, bad = dump(tmp_path), tmp_path / 'bad.json.gz'
  for content, what in ((good.read_bytes()[:-20], 'is truncated or damaged'), (b'{"asin": "B1"}\n', 'is not gzip')):
    bad.write_bytes(content)
    told(tmp_path, rf'bad\.json\.gz: {what}', [good] if as_meta else [bad], [bad] if as_meta else [])


@pytest.mark.parametrize('line, what', [
    (b'{"reviewerID": "A"', 'not JSON'),
    (b'[]', 'a JSON list'),
    ({'asin': 'B1', 'unixReviewTime': 1}, '"reviewerID" is missing'),
    ({'reviewerID': 'U1', 'unixReviewTime': 1}, '"asin" is missing'),
    ({'reviewerID': 'U1', 'asin': 'B1'}, '"unixReviewTime" is missing'),
    (review('', 'B1', 1), '"reviewerID" is \'\', where an id'),
    (review(5, 'B1', 1), '"reviewerID" is 5, where an id'),
    (review('U1', 'B\0', 1), '"asin" is .*, where an id'),
    (review('U1', 'B\ud800', 1), '"asin" is .*, where an id'),
    (review('U1', 'B1', '2014'), '"unixReviewTime" is \'2014\', where whole seconds'),
    (review('U1', 'B1', 1.0), r'"unixReviewTime" is 1\.0, where whole seconds'),
    (review('U1', 'B1', 2**63), '"unixReviewTime" is 9223372036854775808, where whole seconds'),
])
@pytest.mark.parametrize('suffix', ['.json', '.json.gz'])
def test_a_bad_line_is_named_or_tolerated(tmp_path, line, what, suffix):
  rows = [review(f'U{user}', f'B{item}', item) for user in range(5) for item in range(5)]
  path = write_lines(tmp_path / f'x{suffix}', [rows[0], b'', *rows[1:9], line, *rows[9:]])
  told(tmp_path, rf'x{suffix}: line 11: {what}.*--max_bad_lines', [path])
  description = amazon.prepare_dumps([path], name='x', out=tmp_path / 'out', max_bad_lines=1)
  assert (description['bad_lines'], description['steps'][0]['events']) == (1, 25)


def test_each_file_may_have_as_many_bad_lines_as_are_tolerated(tmp_path):
  paths = [write_lines(tmp_path / f'{name}.json', [b'oops', *random_dump(5)]) for name in 'ab']
  assert amazon.prepare_dumps(paths, name='x', out=tmp_path / 'out', max_bad_lines=1)['bad_lines'] == 2


@pytest.mark.parametrize('rows, options, what', [
    ([], {}, r'step "read" dropped the last 0 events; the review files hold no event \(0 bad lines\)'),
    ([b'x', b'y'], {'max_bad_lines': 2}, r'step "read".*\(2 bad lines\)'),
    (random_dump(0), {'min_count': 400}, r'step "k-core, at least 400 events" dropped the last 600 .*--min_count'),
    (random_dump(0), {'min_length': 400}, r'step "histories shorter than 400" dropped the last \d+ .*--min_length'),
])
def test_nothing_left_names_the_step_that_emptied_it(tmp_path, rows, options, what):
  told(tmp_path, 'Nothing is left: ' + what, [write_lines(tmp_path / 'x.json', rows)], **options)


def test_an_output_in_use_is_left_alone(tmp_path):
  path = dump(tmp_path)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/mine').write_text('precious')
  told(tmp_path, 'already in use', [path])
  assert (tmp_path / 'out/mine').read_text() == 'precious'


def test_a_quote_in_a_file_name_is_no_end_of_it(tmp_path):
  path = dump(tmp_path, "it's.json.gz")
  assert amazon.prepare_dumps([path], name='x', out=tmp_path / "o'ut")['statistics']['users'] == 5


def test_real_dumps_are_described(real_data, tmp_path):
  raw = real_data / 'amazon2018_raw'
  stats = {}
  for name in REAL:
    meta = [raw / f'meta_{name}.json.gz'] if name != 'All_Beauty' else []
    stats[name] = amazon.prepare_dumps([raw / f'{name}_5.json.gz'], meta, name=name, out=tmp_path / name)['statistics']
  assert stats['Gift_Cards']['unknown']['title'] == 0 and stats['Gift_Cards']['unknown']['price'] < 0.3
  assert stats['Magazine_Subscriptions']['unknown']['price'] == 1
  assert set(stats['All_Beauty']['unknown'].values()) == {1}
  assert {name: (s['users'], s['items'], s['events']) for name, s in stats.items()} == {
      'Gift_Cards': (456, 147, 2956), 'Magazine_Subscriptions': (326, 138, 2192), 'All_Beauty': (949, 47, 3978)}


def later_ids(data):
  """The share of neighbours of one time and of different items in which the later one has the greater id."""
  own = np.diff(np.repeat(np.arange(len(data.user_ids)), np.diff(data.offsets))) == 0
  tied = own & (np.diff(data.timestamps) == 0) & (np.diff(data.events) != 0)
  return (np.diff(data.events)[tied] > 0).mean()


def test_hashed_ties_say_nothing_of_the_ids(real_data, tmp_path):
  path = real_data / 'amazon2018_raw/Gift_Cards_5.json.gz'
  for ties in time_order.TIES:
    amazon.prepare_dumps([path], name=ties, out=tmp_path / ties, ties=ties)
  dump, hashed = (histories.load(tmp_path / ties) for ties in time_order.TIES)
  assert later_ids(dump) > 0.85 and abs(later_ids(hashed) - 0.5) < 0.05
  assert hashed.options['ties'] == 'hashed' and hashed.fingerprint != dump.fingerprint


def test_a_split_by_time_is_kept_and_enters_the_fingerprint(tmp_path):
  path = write_lines(tmp_path / 'x.json', random_dump(0, n_days=100))
  for split in time_order.SPLITS:
    amazon.prepare_dumps([path], name='x', out=tmp_path / split, split=split)
  plain, timed = (histories.load(tmp_path / split) for split in time_order.SPLITS)
  assert plain.cutoffs is None and plain.fingerprint != timed.fingerprint
  validation, test = timed.cutoffs
  assert 0.75 < (timed.timestamps < validation).mean() <= 0.8 and 0.85 < (timed.timestamps < test).mean() <= 0.9


@pytest.mark.parametrize(('options', 'told'), [
  ({'ties': 'by_id'}, 'hashed'), ({'split': 'random'}, 'leave_one_out'), ({'split': 'time', 'min_count': 1}, 'three periods'),
])
def test_unknown_orders_and_splits(tmp_path, options, told):
  path = write_lines(tmp_path / 'x.json', random_dump(0, n_days=1))
  with pytest.raises(UserError, match=told):
    amazon.prepare_dumps([path], name='x', out=tmp_path / 'out', **options)
  assert not (tmp_path / 'out').exists()
