"""Events tables in every form become the histories of a plain Python loop; what is wrong is named in one line."""

import collections
import csv
import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile

import duckdb
import hypothesis
import pytest
import refusals
from hypothesis import strategies as st

from calrec_jax import cli
from calrec_jax.data import amazon, describe, events, filtering, histories, json_lines
from calrec_jax.errors import UserError

FORMS = ('csv', 'csv.gz', 'tsv', 'jsonl', 'jsonl.gz', 'parquet')
EVENTS = [{'user': f'u{user}', 'item': f'i{(user + step) % 4}', 'time': 1_600_000_000 + step}
          for step in range(4) for user in range(3)]
ITEMS = [{'item_id': f'i{item}', 'title': f'Title {item}', 'category': 'C', 'brand': 'B', 'price': '$1'} for item in range(4)]


def write(path, rows, form, **dialect):
  """A table of texts (or None) as a file; of JSON and Parquet the values as they are."""
  names = list(rows[0])
  if form == 'parquet':
    lines = write(path.with_suffix('.tmp'), rows, 'jsonl')
    types = {name: 'VARCHAR' if isinstance(rows[0][name], (str, type(None))) else 'BIGINT' for name in names}
    duckdb.execute(f"""COPY (SELECT * FROM read_json('{lines}', format='newline_delimited', columns={types})) TO '{path}'""")
    lines.unlink()
    return path
  if form.startswith('jsonl'):
    content = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  else:
    buffer = io.StringIO(newline='')
    writer = csv.DictWriter(buffer, names, delimiter='\t' if form == 'tsv' else ',', **dialect)
    writer.writeheader()
    writer.writerows(rows)
    content = buffer.getvalue()
  path.write_bytes(gzip.compress(content.encode()) if form.endswith('.gz') else content.encode())
  return path


def prepare(folder, rows=EVENTS, items=ITEMS, *, form='csv', out='out', **options):
  log, shop = write(folder / f'events.{form}', rows, form), write(folder / f'items.{form}', items, form)
  return events.prepare_events([log], shop, name='x', out=folder / out, **{'min_length': 1, 'progress': False, **options})


def read(log, shop, out, **options):
  return events.prepare_events([log], shop, name='x', out=out, progress=False, **options)


def contents(folder):
  return [gzip.decompress((folder / f'{name}.jsonl.gz').read_bytes()) for name in ('sequences', 'items')]


def plain(rows, items, *, unit=10**9, min_count=0, min_rating=None, dedup='consecutive', min_length=1, ties='dump'):
  """The law's other side: the bytes of the two files, or [] if nothing is left."""
  rows = [row for row in rows if min_rating is None or float(row['rating']) >= min_rating]
  while True:
    users, bought = (collections.Counter(row[what] for row in rows) for what in ('user', 'item'))
    kept = [row for row in rows if users[row['user']] >= min_count and bought[row['item']] >= min_count]
    if len(kept) == len(rows):
      break
    rows = kept
  hashed = lambda row: hashlib.md5(f'{row["user"]}\n{row["item"]}'.encode()).hexdigest()[:16] if ties == 'hashed' else ''
  of_user = collections.defaultdict(list)
  for row in sorted(rows, key=lambda row: (int(row['time']), hashed(row))):
    history = of_user[row['user']]
    if dedup == 'none' or row['item'] not in [item for item, _ in (history[-1:] if dedup == 'consecutive' else history)]:
      history.append((row['item'], int(row['time']) * unit // 10**9))
  lines = [{'user_id': user, 'item_ids': [item for item, _ in history], 'timestamps': [time for _, time in history]}
           for user, history in sorted(of_user.items()) if len(history) >= min_length]
  texts = {item['item_id']: item for item in items}
  found = [texts[item] for item in sorted({item for line in lines for item in line['item_ids']})]
  return lines and [''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in each).encode() for each in (lines, found)]


WORDS = ['a', 'b', 'B', ' a', 'a ', 'é', 'e\u0301', '\U0001f381', 'مرحبا', '"', '"q" x', "it's", 'x,y', 'x;y|z', 'a\nb',
         'a\r\n"b"', 'NULL', 'nan', '007', '7', '#', '\\N', 'a\\', '\u2028']
ROWS = st.lists(st.fixed_dictionaries({
    'user': st.sampled_from(WORDS), 'item': st.sampled_from(WORDS), 'time': st.integers(0, 5),
    'rating': st.sampled_from(['1', '2.5', '5'])}), min_size=1, max_size=40)
UNIT_STARTS = {10**9: 1_600_000_000, 10**6: 1_600_000_000_000, 10**3: 1_600_000_000_000_000, 1: 1_600_000_000_000_000_000}


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(ROWS, st.sampled_from(FORMS), st.sampled_from(list(UNIT_STARTS)), st.sampled_from([0, 2]),
                  st.sampled_from([None, 2.5]), st.sampled_from(list(filtering.DEDUP)), st.integers(1, 3),
                  st.sampled_from(['dump', 'hashed']))
def test_any_table_in_any_form_gives_the_histories_of_a_plain_loop(rows, form, unit, min_count, min_rating, dedup, min_length,
                                                                  ties):
  rows = [row | {'time': row['time'] + UNIT_STARTS[unit]} for row in rows]
  items = [{'item_id': word, 'title': f't{number}', 'category': 'x, "y"', 'brand': 'é', 'price': ''}
           for number, word in enumerate(WORDS)]
  options = {'min_count': min_count, 'min_rating': min_rating, 'dedup': dedup, 'min_length': min_length, 'ties': ties}
  expected = plain(rows, items, unit=unit, **options)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    if not expected:
      refusals.refused(lambda: prepare(folder, rows, items, form=form, **options), 'Nothing is left: step')
      return
    description = prepare(folder, rows, items, form=form, **options)
    assert contents(folder / 'out') == expected
  assert description['bad_lines'] == 0 and description['steps'][0]['events'] == len(rows)


@pytest.mark.parametrize('mutate', [
    lambda patch: patch.setitem(filtering.EVENT_ORDERS, 'dump', 'time, item'),
    lambda patch: patch.setitem(filtering.REPEATS, 'consecutive', filtering.REPEATS['none']),
    lambda patch: patch.setattr(filtering, 'k_core', lambda *_: None)], ids=['ties by item', 'repeats kept', 'no k-core'])
def test_the_comparison_fails_on_mutants(tmp_path, monkeypatch, mutate):
  rows = [{'user': f'u{n % 3}', 'item': f'i{n * n % 7 % 4}', 'time': 1_600_000_000 + n // 12} for n in range(60)]
  rows += [{'user': 'rare', 'item': f'i{n}', 'time': 1_600_000_000} for n in (2, 1)]
  expected = plain(rows, ITEMS, min_count=3)
  prepare(tmp_path, rows, min_count=3)
  assert contents(tmp_path / 'out') == expected
  mutate(monkeypatch)
  prepare(tmp_path, rows, min_count=3, out='mutant')
  assert contents(tmp_path / 'mutant') != expected


def test_a_table_that_python_reads_gives_what_duckdb_reads(tmp_path):
  expected = plain(EVENTS, ITEMS)
  lines = ['user,item,time'] + [f'{row["user"]},{row["item"]},{row["time"]}' for row in EVENTS]
  (tmp_path / 'mixed.csv').write_bytes(''.join(line + ('\r\n' if n % 2 else '\n') for n, line in enumerate(lines)).encode())
  for name, ending, mark in (('crlf', '\r\n', b''), ('bom', '\n', b'\xef\xbb\xbf'), ('cr', '\r', b'')):
    (tmp_path / f'{name}.csv').write_bytes(mark + ending.join([*lines, '']).encode())
  (tmp_path / 'bom.jsonl').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(map(json.dumps, EVENTS)).encode())
  shop = write(tmp_path / 'items.csv', ITEMS, 'csv')
  for name in ('mixed.csv', 'crlf.csv', 'bom.csv', 'cr.csv', 'bom.jsonl'):
    events.prepare_events([tmp_path / name], shop, name='x', out=tmp_path / f'out {name}', min_length=1)
    assert contents(tmp_path / f'out {name}') == expected, name


def test_the_bytes_depend_on_neither_threads_nor_memory_nor_the_folder_in_between(tmp_path):
  rows = [{'user': f'u{n * 7919 % 501}', 'item': f'i{n * n % 4}', 'time': 1_600_000_000 + n % 3} for n in range(20_000)]
  prepare(tmp_path, rows)
  (tmp_path / 'work').mkdir()
  prepare(tmp_path, rows, out='other', threads=3, memory_limit='200MB', tmp_dir=tmp_path / 'work')
  for name in ('sequences.jsonl.gz', 'items.jsonl.gz', 'dataset.json'):
    assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'other' / name).read_bytes()
  assert os.listdir(tmp_path / 'work') == []


def test_several_files_are_one_table(tmp_path):
  parts = [write(tmp_path / 'one.csv', EVENTS[:5], 'csv'), write(tmp_path / 'two.jsonl', EVENTS[5:], 'jsonl')]
  events.prepare_events(parts, write(tmp_path / 'i.parquet', ITEMS, 'parquet'), name='x', out=tmp_path / 'out', min_length=1)
  assert contents(tmp_path / 'out') == plain(EVENTS, ITEMS)


def test_a_user_with_100_000_events(tmp_path):
  rows = [{'user': 'bot', 'item': f'i{n % 4}', 'time': 1_600_000_000 + n // 1000} for n in range(100_000)]
  assert prepare(tmp_path, rows)['statistics']['length'] == {'mean': 100_000.0, 'min': 100_000, 'max': 100_000}
  assert contents(tmp_path / 'out') == plain(rows, ITEMS)


@pytest.mark.parametrize('name', ['Gift_Cards', 'Magazine_Subscriptions', 'All_Beauty'])
@pytest.mark.parametrize('ties', ['dump', 'hashed'])
def test_a_real_dump_read_as_a_table_gives_what_it_gives_as_a_dump(real_data, tmp_path, name, ties):
  reviews = real_data / f'amazon2018_raw/{name}_5.json.gz'
  expected = amazon.prepare_dumps([reviews], name='x', out=tmp_path / 'dump', ties=ties, progress=False)
  found = read(reviews, tmp_path / 'dump/items.jsonl.gz', tmp_path / 'out', min_count=5, ties=ties, unknown_items='keep')
  assert found['fingerprint'] == expected['fingerprint'] and found['steps'] == expected['steps']
  assert found['columns'] == {'user': 'reviewerID', 'item': 'asin', 'time': 'unixReviewTime', 'item_id': 'item_id',
                              **{field: field for field in histories.FIELDS}}


# The files of others, as they are.

def movielens(rows, layout):
  lines = {'u.data': '{user}\t{item}\t{rating}\t{time}', 'ratings.dat': '{user}::{item}::{rating}::{time}',
           'ratings.csv': '{user},{item},{rating},{time}', 'x.inter': '{user}\t{item}\t{rating}\t{time}'}[layout]
  heads = {'ratings.csv': 'userId,movieId,rating,timestamp\n',
           'x.inter': 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'}
  return heads.get(layout, '') + ''.join(lines.format(**row) + '\n' for row in rows)


FILMS = {'1': 'Café "Ö", The (1995)', '2': '"Weird Al" | Co: (1996)'}
SHOPS = {
    'u.data': ('u.item', ''.join(
        f'{n}|{title.replace("|", "-")}|01-Jan-1995||http://us.imdb.com/M?x|0|1|0|0|0|1|{"|".join("0" * 12)}|1\n'
        for n, title in FILMS.items()), 'latin-1', 'Action, Comedy, Western'),
    'ratings.dat': ('movies.dat', ''.join(f'{n}::{title}::Action|Sci-Fi\n' for n, title in FILMS.items()), 'latin-1',
                    'Action, Sci-Fi'),
    'ratings.csv': ('movies.csv', 'movieId,title,genres\n1,"Café ""Ö"", The (1995)",Action|IMAX\n'
                    '2,"""Weird Al"" | Co: (1996)",(no genres listed)\n', 'utf-8', 'Action, IMAX'),
    'x.inter': ('x.item', 'item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n' + ''.join(
        f"{n}\t{title}\t1995\tAnimation Children's\n" for n, title in FILMS.items()), 'utf-8', "Animation, Children's"),
}


@pytest.mark.parametrize('layout', SHOPS)
def test_movielens_and_recbole_are_read_as_they_are(tmp_path, layout):
  rows = [{'user': str(n % 3), 'item': str(n % 2 + 1), 'rating': 1 + n % 5, 'time': 880_000_000 + n // 2} for n in range(24)]
  shop, content, encoding, category = SHOPS[layout]
  (tmp_path / layout).write_text(movielens(rows, layout))
  (tmp_path / shop).write_text(content, encoding=encoding)
  description = events.prepare_events([tmp_path / layout], tmp_path / shop, name='x', out=tmp_path / 'out', min_rating=2)
  rest = {'brand': '', 'price': ''}
  items = [{'item_id': n, 'title': title if shop != 'u.item' else title.replace('|', '-'), 'category': category} | rest
           for n, title in FILMS.items()]
  if shop == 'movies.csv':
    items[1]['category'] = ''
  assert contents(tmp_path / 'out') == plain(rows, items, min_rating=2, min_length=3)
  assert description['times'] == {'unit': 'seconds', 'first': '1997-11-20 04:26:40', 'last': '1997-11-20 04:26:51'}


def test_movies_in_utf_8_are_read_as_such(tmp_path):
  (tmp_path / 'ratings.dat').write_text('1::1::4.5::880000000\n')
  (tmp_path / 'movies.dat').write_text('1::Misérables, Les (1995)::Drama\n', encoding='utf-8')
  events.prepare_events([tmp_path / 'ratings.dat'], tmp_path / 'movies.dat', name='x', out=tmp_path / 'out', min_length=1)
  assert histories.load(tmp_path / 'out').items[0]['title'] == 'Misérables, Les (1995)'


# Columns.

def test_columns_are_told_by_usual_names_or_named(tmp_path):
  odd = [{'a': row['user'], 'User ID': 'no', 'SKU': row['item'], 'b': 'x', 'date': row['time']} for row in EVENTS]
  shop = [{'id': item['item_id'], 'label': item['title'], 'genre': 'C', 'maker': 'B', 'price': '$1', 'x': 1} for item in ITEMS]
  description = prepare(tmp_path, odd, shop, event_columns={'user': 'a'}, item_columns={'title': 'label', 'brand': 'maker'})
  assert contents(tmp_path / 'out') == plain(EVENTS, ITEMS)
  assert description['columns'] == {'user': 'a', 'item': 'SKU', 'time': 'date', 'item_id': 'id', 'title': 'label',
                                    'category': 'genre', 'brand': 'maker', 'price': 'price'}
  assert 'columns: user a, item SKU' in describe.format_description(description)


@pytest.mark.parametrize('renamed, given, words', [
    ({'user': 'who'}, {}, ['which column is the user', '--user_column', 'its columns: who, item, time']),
    ({}, {'user': 'User'}, ["no column 'User'", '--user_column', 'user, item, time']),
    ({}, {'user': 'item', 'item': 'item'}, ["'item' is to be two things", 'user and item']),
    ({}, {'user': 'item'}, ['which column is the item']),
])
def test_a_wrong_column_is_refused_with_those_that_are_there(tmp_path, renamed, given, words):
  rows = [{renamed.get(name, name): value for name, value in row.items()} for row in EVENTS]
  refusals.refused(lambda: prepare(tmp_path, rows, event_columns=given), 'events.csv', *words)
  assert not (tmp_path / 'out').exists()


def test_columns_that_could_be_either_are_refused(tmp_path):
  rows = [row | {'user_id': 'x'} for row in EVENTS]
  refusals.refused(lambda: prepare(tmp_path, rows), 'user and user_id may each be the user', '--user_column')
  refusals.refused(lambda: prepare(tmp_path, items=[item | {'genres': 'x'} for item in ITEMS]),
                   'category and genres may each be the category', '--item_columns category=COLUMN')
  prepare(tmp_path, items=[item | {'genres': 'x'} for item in ITEMS], item_columns={'category': ''})
  assert {item['category'] for item in histories.load(tmp_path / 'out').items} == {''}
  (tmp_path / 'twice.csv').write_text('user,user,item,time\na,b,i1,1\n')
  refusals.refused(lambda: read(tmp_path / 'twice.csv', tmp_path / 'items.csv', tmp_path / 'o'), "2 columns 'user'")


# Items.

def test_items_without_texts_are_refused_kept_or_dropped(tmp_path):
  few = [ITEMS[0], ITEMS[1], ITEMS[2] | {'title': '', 'category': ' ', 'brand': None, 'price': None}]
  refusals.refused(lambda: prepare(tmp_path, items=few), 'items.csv', "2 of the 4 items with events have no texts there, "
                   "such as 'i2'", '--unknown_items keep', '--unknown_items drop')
  kept = prepare(tmp_path, items=few, unknown_items='keep', out='kept')
  assert kept['metadata'] == {'lines': 4, 'repeated_lines': 0, 'items_without': 2} and kept['statistics']['items'] == 4
  dropped = prepare(tmp_path, items=few, unknown_items='drop', out='dropped')
  assert dropped['steps'][1] == {'step': 'items without texts', 'dropped': 6, 'events': 6, 'users': 3, 'items': 2}
  assert contents(tmp_path / 'dropped') == plain([row for row in EVENTS if row['item'] in ('i0', 'i1')], ITEMS)
  refusals.refused(lambda: prepare(tmp_path, items=[item | {'item_id': item['item_id'].upper()} for item in ITEMS], out='o'),
                   "4 of the 4 items with events have no texts there, such as 'i0'")


def test_items_without_events_are_left_out_or_kept(tmp_path):
  more = [{**ITEMS[0], 'item_id': 'a'}, *ITEMS]
  prepare(tmp_path, items=more)
  prepare(tmp_path, items=more, all_items=True, out='all')
  few, every = histories.load(tmp_path / 'out'), histories.load(tmp_path / 'all')
  assert (few.item_ids, every.item_ids) == (['i0', 'i1', 'i2', 'i3'], ['a', 'i0', 'i1', 'i2', 'i3'])
  assert every.events.tolist() == (few.events + 1).tolist()


def test_a_repeated_item_is_refused_unless_it_is_the_same(tmp_path):
  assert prepare(tmp_path, items=[*ITEMS, ITEMS[1]])['metadata']['repeated_lines'] == 1
  refusals.refused(lambda: prepare(tmp_path, items=[*ITEMS, ITEMS[1] | {'price': '$2'}], out='o'),
                   'items.csv', "item 'i1' is listed a second time")


def test_ids_are_kept_apart_by_case_and_blanks(tmp_path):
  rows = [{'user': user, 'item': 'i0', 'time': 1_600_000_000} for user in ('ann', 'Ann', ' ann', 'ann ', 'a nn')]
  description = prepare(tmp_path, rows)
  assert description['statistics']['users'] == 5 and description['similar_ids'] == {'users': 5, 'items': 0}
  assert '5 users differ from another one only by case or blanks' in describe.format_description(description)
  assert 'similar_ids' not in prepare(tmp_path, out='others')


def test_attributes_of_json_and_parquet_are_those_of_ready_sequences(tmp_path):
  items = [{'item_id': 1, 'title': 'Tom &amp; Jerry\n', 'category': ['TV', 'Fun'], 'brand': None, 'price': 3.5},
           {'item_id': 2, 'title': 7}]
  log = write(tmp_path / 'events.jsonl', [{'user': 1, 'item': 1 + n % 2, 'time': n} for n in range(4)], 'jsonl')
  (tmp_path / 'sequences.jsonl').write_text('{"user_id": 1, "item_ids": [1, 2, 1, 2], "timestamps": [0, 1, 2, 3]}')
  shop = write(tmp_path / 'items.jsonl', items, 'jsonl')
  ready = histories.prepare(tmp_path / 'sequences.jsonl', shop, name='x', out=tmp_path / 'ready')
  assert events.prepare_events([log], shop, name='x', out=tmp_path / 'out')['fingerprint'] == ready['fingerprint']
  duckdb.execute(f"""COPY (SELECT 1 AS item_id, 'a' AS title, ['x', 'y'] AS category, 'nan'::DOUBLE AS price
                     UNION ALL SELECT 2, 'b', ['z'], 2.5) TO '{tmp_path}/items.parquet'""")
  events.prepare_events([log], tmp_path / 'items.parquet', name='x', out=tmp_path / 'nan')
  assert [(item['category'], item['price']) for item in histories.load(tmp_path / 'nan').items] == [('x, y', ''), ('z', '2.5')]


# Bad input.

def refuse(tmp_path, name, content, *words, shop=None, **options):
  """A file of events (bytes) is refused, and nothing is left behind."""
  (tmp_path / name).write_bytes(content)
  shop = shop or write(tmp_path / 'items.csv', ITEMS, 'csv')
  before = sorted(os.listdir(tmp_path))
  refusals.refused(lambda: read(tmp_path / name, shop, tmp_path / 'out', **options), name, *words)
  assert sorted(os.listdir(tmp_path)) == before


HEAD = b'user,item,time\n'
GOOD = b'a,i1,1600000000\n'
JSON_LINE = b'{"user": 1, "item": 2, "time": 1600000000}\n'


@pytest.mark.parametrize('name, content, words', [
    ('e.csv', b'', ['is empty']),
    ('e.csv', HEAD, ['holds no event']),
    ('e.csv', GOOD, ['which column is the user', 'a, i1, 1600000000']),
    ('e.csv', HEAD + GOOD + b'a,i1\n', ['line 3', '2 fields, where 3 are expected', '--max_bad_lines']),
    ('e.csv', HEAD + GOOD + b'a,"i1,1600000000\n', ['line 3', 'is not CSV']),
    ('e.csv', HEAD + GOOD + b'\xff,i1,1600000000\n', ['line 3', 'not UTF-8']),
    ('e.csv', HEAD + GOOD + b',i1,1600000000\n', ['row 2', "'user' is missing", '--max_bad_lines']),
    ('e.csv', HEAD + GOOD + b'a,"",1600000000\n', ['row 2', "'item' is missing"]),
    ('e.csv', HEAD + GOOD + b'a,i1,\n', ['row 2', "'time' is missing"]),
    ('e.csv', HEAD + GOOD + b'a,i1,yesterday\n', ['row 2', "'time' is 'yesterday', where a time"]),
    ('e.csv', HEAD + b'a,i1,"May 5, 2014"\n', ["column 'time' holds no times (such as 'May 5, 2014')", 'ISO 8601']),
    ('e.csv', HEAD + GOOD + b'a,i1,1600000000000\n', ["'time' mixes", 'milliseconds (1', 'seconds (1', '--time_unit']),
    ('e.csv', HEAD + GOOD + b'a\0,i1,1600000000\n', ['row 2', "'user'"]),
    ('e.csv', HEAD + b'a' * 2_100_000, ['line 2', 'longer than 2,000,000']),
    ('e.csv', b'PK\x03\x04', ['a zip archive']),
    ('e.csv', 'user,item,time\n'.encode('utf-16'), ['UTF-16']),
    ('e.csv', (HEAD + GOOD).decode().encode('utf-16-le'), ['no text in UTF-8', 'zero bytes']),
    ('e.csv', b'\x89PNG\r\n\x1a\n\x1b[2J', ['which column is the user', 'its columns: \N{REPLACEMENT CHARACTER}PNG']),
    ('e.csv', b'"' + HEAD + GOOD, ['which column is the user', 'its columns: user,item,time a,i1,1600000000']),
    ('e.csv', HEAD + GOOD + 'ä,i1,1600000000\n'.encode('cp1252'), ['line 3', 'not UTF-8']),
    ('e.csv', HEAD + GOOD + b'a,i1,NaN\n', ['row 2', "'time' is 'NaN', where a time"]),
    ('e.csv', HEAD + GOOD + b'a,i1,1e400\n', ['row 2', "'time' is '1e400', where a time"]),
    ('e.csv', HEAD + GOOD + b'a,i1,1e99\n', ["'1e99', which is in no unit", '--time_unit']),
    ('e.tsv', b'a\tb\tuser\tc\td\ttime\te\tf\tg\titems\n', ['which column is the item', 'user, c, d, time, e, f, g, items']),
    ('e.csv.gz', HEAD, ['is not gzip']),
    ('e.csv.gz', gzip.compress(b'PAR1' + HEAD, mtime=0), ['Parquet inside gzip']),
    ('e.csv.gz', gzip.compress(HEAD + GOOD, mtime=0)[:-9], ['is truncated']),
    ('e.json', b'[{"user": 1}]', ['one JSON list', 'one object a line']),
    ('e.json', b'\n [1]', ['one JSON list', 'one object a line']),
    ('e.json', b'{\n "user": 1,\n "item": 2\n}\n', ['line 1: not JSON', 'no line is an object', 'one object a line']),
    ('e.json', b"{'user': 1, 'item': 2, 'time': 3}\n", ['line 1: not JSON', 'no line is an object']),
    ('e.json', b'{}\n', ['which column is the user', 'its columns: none']),
    ('e.json', b'{"user": 1, "item": 2, "time": 3}\n{"user"', ['line 2', 'not JSON']),
    ('e.json', JSON_LINE + b'{"user": 1, "item": 2, "time": 1e400}', ['row 2', "'time' is '1e400'"]),
    ('e.json', JSON_LINE + b'{"user": 1, "item": 2, "time": NaN}', ['row 2', "'time' is 'NaN'"]),
    ('e.json', b'{"user": 1.5, "item": 2, "time": 3}', ['row 1', "'user' is missing, or is not an id"]),
    ('e.json', b'{"user": {"a": 1}, "item": 2, "time": 3}', ['row 1', "'user' is missing, or is not an id"]),
    ('e.json', b'{"user": "\\ud800", "item": 2, "time": 3}', ['line 1', 'surrogate']),
    ('e.json', b'{"user": "a", "item": 2, "time": true}', ["holds no times (such as 'true')"]),
    ('e.parquet', HEAD + GOOD, ['is no Parquet file']),
    ('e.parquet', b'PAR1' + HEAD, ['not a Parquet file that can be read']),
])
def test_bad_events_are_one_clear_line(tmp_path, name, content, words):
  refuse(tmp_path, name, content, *words)


def test_bad_ratings_and_wrong_types_of_columns(tmp_path):
  content = b'user,item,time,rating\na,i1,1,5\nb,i1,1,good\n'
  refuse(tmp_path, 'e.csv', content, 'row 2', "'rating' is 'good', where a number", min_rating=1)
  refuse(tmp_path, 'e.csv', HEAD + GOOD, 'which column is the rating', min_rating=1)
  duckdb.execute(f"COPY (SELECT 1.5::DOUBLE AS user, 'i1' AS item, 1 AS time) TO '{tmp_path}/f.parquet'")
  refuse(tmp_path, 'e.parquet', (tmp_path / 'f.parquet').read_bytes(), "'user' is DOUBLE, where ids are texts or whole numbers")


@pytest.mark.parametrize('columns, words', [
    ("['a'] AS user, 'i1' AS item, 1 AS time", ["'user' is VARCHAR[]", 'ids are texts or whole numbers']),
    ("'a' AS user, 'i1' AS item, [1] AS time", ["'time' is INTEGER[]", 'one value is expected']),
    ("{'a': 1} AS user, 'i1' AS item, 1 AS time", ["'user' is STRUCT(a INTEGER)"]),
    ("'a' AS user, 'i1' AS item, 'nan'::DOUBLE AS time", ["holds no times (such as 'nan')"]),
    ("NULL AS user, 'i1' AS item, 1 AS time", ["'user' is \"NULL\""]),
    ("'a' AS user, 'i1' AS item, 1 AS time LIMIT 0", ['holds no event']),
])
def test_parquet_of_what_is_no_events_table(tmp_path, columns, words):
  duckdb.execute(f"COPY (SELECT {columns}) TO '{tmp_path}/f.parquet'")
  refuse(tmp_path, 'e.parquet', (tmp_path / 'f.parquet').read_bytes(), *words)


def test_a_damaged_parquet_file_is_named_as_it_is_called(tmp_path):
  content = write(tmp_path / 'f.parquet', EVENTS, 'parquet').read_bytes()
  refuse(tmp_path, 'e.parquet', content[:10] + bytes(20) + content[30:], 'cannot be read', 'write it anew')
  with pytest.raises(UserError) as caught:
    read(tmp_path / 'e.parquet', tmp_path / 'items.csv', tmp_path / 'out')
  assert '.out' not in str(caught.value)


def test_of_a_key_that_stands_twice_in_json_the_last_counts_whoever_reads(tmp_path):
  twice = b'{"user": "a", "user": "b", "item": "i1", "time": 1600000000}\n'
  for name, content, bad in (('duckdb.json', twice, 0), ('python.json', twice + b'{\n', 1)):
    (tmp_path / name).write_bytes(content)
    read(tmp_path / name, write(tmp_path / 'items.csv', ITEMS, 'csv'), tmp_path / name[:6], min_length=1, max_bad_lines=bad)
    assert histories.load(tmp_path / name[:6]).user_ids == ['b']


def test_what_json_has_no_name_for_is_left_out_among_other_bad_lines(tmp_path):
  good = b'{"user": "a", "item": "i1", "time": 1600000000}\n'
  for number, line in enumerate((b'{"user": NaN, "item": "i1", "time": 1}', b'{"user": "a", "item": "i1", "time": 1e400}',
                                 b'{"user": ' + b'9' * 5000 + b', "item": "i1", "time": 1}')):
    (tmp_path / 'e.json').write_bytes(good + b'{\n' + line)
    out = tmp_path / f'out{number}'
    description = read(tmp_path / 'e.json', write(tmp_path / 'items.csv', ITEMS, 'csv'), out, min_length=1, max_bad_lines=2)
    assert description['bad_lines'] == 2 and histories.load(out).user_ids == ['a']


def test_tolerated_rows_are_left_out_and_counted(tmp_path):
  content = HEAD + GOOD * 2 + b'a,i2,x\n,i2,1600000000\na,i2\n' + b'a,i3,1600000009\n' + b'a,"i2,1\n'
  (tmp_path / 'e.csv').write_bytes(content)
  shop = write(tmp_path / 'items.csv', ITEMS, 'csv')
  description = read(tmp_path / 'e.csv', shop, tmp_path / 'out', min_length=1, max_bad_lines=4)
  assert description['bad_lines'] == 4 and description['steps'][0]['events'] == 3
  shutil.rmtree(tmp_path / 'out')
  refuse(tmp_path, 'e.csv', content, '(4 bad rows, 3 tolerated)', max_bad_lines=3)


def test_a_path_that_is_a_folder_or_missing(tmp_path):
  log, shop = write(tmp_path / 'e.csv', EVENTS, 'csv'), write(tmp_path / 'items.csv', ITEMS, 'csv')
  (tmp_path / 'dir.csv').mkdir()
  for name, word in (('dir.csv', 'is a folder'), ('none.csv', 'no such file')):
    refusals.refused(lambda name=name: read(tmp_path / name, shop, tmp_path / 'out'), name, word)
    refusals.refused(lambda name=name: read(log, tmp_path / name, tmp_path / 'out'), name, word)


def test_names_of_files_are_no_patterns(tmp_path):
  write(tmp_path / 'a1.csv', EVENTS * 2, 'csv')
  log = write(tmp_path / "a[1]*'.csv", EVENTS, 'csv')
  assert read(log, write(tmp_path / 'i.csv', ITEMS, 'csv'), tmp_path / 'out')['steps'][0]['events'] == 12


@pytest.mark.parametrize('options, words', [
    ({'min_rating': 9, 'event_columns': {'rating': 'time', 'time': 'time'}}, ['is to be two things']),
    ({'min_count': 99}, ['step "k-core, at least 99 events" dropped the last 12', '--min_count']),
    ({'min_length': 99}, ['step "histories shorter than 99"', '--min_length']),
    ({'dedup': 'all'}, ["dedup = 'all'", 'consecutive, none, first']),
    ({'unknown_items': 'ask'}, ["unknown_items = 'ask'"]),
    ({'time_unit': 'hours'}, ["time_unit = 'hours'"]),
    ({'time_unit': 'dates'}, ['row 1', "'time' is '1600000000'"]),
    ({'memory_limit': 'lots'}, ['--memory_limit lots', '2GB']),
    ({'tmp_dir': __file__}, ['test_events.py: nothing can be written there', '--tmp_dir']),
    ({'ties': 'random'}, ["ties = 'random'"]),
    ({'threads': 100_000}, ['--threads 100000', 'at most 1,024']),
    ({'min_rating': float('nan')}, ['--min_rating nan']),
])
def test_bad_options(tmp_path, options, words):
  refusals.refused(lambda: prepare(tmp_path, **options), *words)
  assert not (tmp_path / 'out').exists()


def test_the_command_line(tmp_path, capsys):
  write(tmp_path / 'e.csv', [{'who': row['user'], 'what': row['item'], 'when': row['time']} for row in EVENTS], 'csv')
  write(tmp_path / 'i.csv', [{'what': item['item_id'], 'name': item['title']} for item in ITEMS], 'csv')
  command = ['prepare', 'histories', '--items', str(tmp_path / 'i.csv'), '--name', 'x', '--out', str(tmp_path / 'out')]
  told = ['--events', str(tmp_path / 'e.csv'), '--user_column', 'who', '--item_column', 'what', '--time_column', 'when',
          '--item_columns', 'item_id=what,title=name', '--threads', '1', '--memory_limit', '1GB', '--tmp_dir', str(tmp_path)]
  assert cli.main([*command, *told]) == 0
  assert 'times: seconds, from 2020-09-13 12:26:40' in capsys.readouterr().out
  assert histories.load(tmp_path / 'out').item_ids == ['i0', 'i1', 'i2', 'i3']
  for more, word in ((['--sequences', 'x', '--min_count', '5'], '--min_count: belongs to --events'),
                     ([*told[:2], '--item_columns', 'name'], "--item_columns 'name': write WHAT=COLUMN")):
    assert cli.main([*command, *more]) == 2
    assert word in capsys.readouterr().err


def test_sources_are_described_without_folders(tmp_path):
  description = prepare(tmp_path, form='parquet')
  assert [source['lines'] for source in description['sources']] == [12, 4]
  assert description == json.loads((tmp_path / 'out/dataset.json').read_text())
  assert str(tmp_path) not in json.dumps(description)
  assert description['sources'][0] == json_lines.inspect(tmp_path / 'events.parquet').description() | {'lines': 12}
