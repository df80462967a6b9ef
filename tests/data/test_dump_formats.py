"""Formats of dumps are told by content; what is wrong in one is named, and an unchanged run does nothing."""

import ast
import gzip
import json
import logging
import os
import tracemalloc

import numpy as np
import pytest

from calrec_jax.data import amazon, describe, dump_formats, dump_rules, histories, json_lines
from calrec_jax.errors import UserError

DAY = 86_400
USERS = [f'A{number}XKQRKQDOPQ2' for number in range(6)]
ASINS = [f'B00{number}ABCDEF' for number in range(6)]
EVENTS = [(user, asin, 1_400_000_000 + number * DAY) for number, asin in enumerate(ASINS) for user in USERS]
OLD = [{'reviewerID': user, 'asin': asin, 'unixReviewTime': time, 'overall': 5.0, 'helpful': [0, 0]}
       for user, asin, time in EVENTS]
NEW = [{'user_id': user, 'parent_asin': asin, 'asin': 'X', 'timestamp': time * 1000 + 5, 'rating': 5, 'verified_purchase': True}
       for user, asin, time in EVENTS]
RATINGS = [f'{user},{asin},5.0,{time}' for user, asin, time in EVENTS]
META = [{'asin': asin, 'title': "It's", 'categories': [['A', 'B'], ['C']], 'price': 12.5, 'brand': 'X'} for asin in ASINS]


def put(path, lines, end='\n'):
  """Writes lines: texts and bytes as they are, objects as JSON."""
  content = end.encode().join(
      line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines)
  path.write_bytes(gzip.compress(content + end.encode()) if path.suffix == '.gz' else content + end.encode())
  return path


def prepare(tmp_path, reviews, meta=(), out='out', **options):
  return amazon.prepare_dumps([reviews], meta, name='x', out=tmp_path / out, progress=False, **options)


def told(tmp_path, reviews, *words, meta=(), **options):
  """Asserts that the error has these words in its one line, and that nothing is left behind."""
  before = sorted(os.listdir(tmp_path))
  with pytest.raises(UserError) as caught:
    prepare(tmp_path, reviews, meta, **options)
  assert '\n' not in str(caught.value)
  for word in words:
    assert word in str(caught.value)
  assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(('lines', 'name', 'format_', 'time'), [
    (OLD, 'x.json.gz', 'Amazon 2014', None), (NEW, 'x.jsonl.gz', 'Amazon 2023', 'milliseconds'),
    (RATINGS, 'x.csv', 'Amazon 2014 ratings', None),
    ([','.join(np.array(line.split(','))[[1, 0, 2, 3]]) for line in RATINGS], 'x.csv.gz', 'Amazon 2018 ratings', None),
    (['user_id,parent_asin,rating,timestamp', *(f'{line}000' for line in RATINGS)], 'x', 'Amazon 2023 ratings', 'milliseconds'),
    (['timestamp,asin,,reviewerID', *(f'{time},{asin},?,{user}' for user, asin, time in EVENTS)], 'x', 'ratings', None),
])
def test_every_format_gives_the_same_histories(tmp_path, lines, name, format_, time):
  prepare(tmp_path, put(tmp_path / 'usual.json', [dict(list(row.items())[:4]) for row in OLD]))
  description = prepare(tmp_path, put(tmp_path / name, lines), out='other')
  assert description['fingerprint'] == histories.load(tmp_path / 'out').fingerprint
  [source] = description['sources']
  assert (source.get('format'), source.get('time')) == (format_, time)
  assert format_ in describe.format_description(description)


@pytest.mark.parametrize('write', [repr, json.dumps])
def test_metadata_of_2014_may_be_python(tmp_path, write):
  meta = put(tmp_path / 'meta.json.gz', map(write, META))
  description = prepare(tmp_path, put(tmp_path / 'x.json', OLD), [meta])
  assert set(map(str, histories.load(tmp_path / 'out').items)) == {
      str({'title': "It's", 'category': 'A, B', 'brand': 'X', 'price': '$12.50'})}
  assert description['sources'][1]['format'] == 'Amazon 2014' + (', single quotes' if write is repr else '')


@pytest.mark.parametrize('line', [
    "{'asin': __import__('os').getcwd()}", "{'asin': 'B1', 'price': 1 + open}", "{'asin': 'B1'", "{'a': " + '[' * 5000,
    "{'asin': b'B1'}", "{'asin'}"])
def test_what_is_no_literal_is_a_bad_line_and_never_run(tmp_path, line):
  meta = put(tmp_path / 'meta.json', [*map(repr, META), line])
  told(tmp_path, put(tmp_path / 'x.json', OLD), 'meta.json: line 7: ', '--max_bad_lines', meta=[meta])
  assert prepare(tmp_path, tmp_path / 'x.json', [meta], max_bad_lines=1)['bad_lines'] == 1


def test_odd_values_of_a_literal_are_unknown(tmp_path):
  row = "{'asin': 'B000ABCDEF', 'title': {1}, 'brand': b'x', 'price': 1e999, 'categories': (('A', 3j),), 'd': {(1, 2): 3}}"
  prepare(tmp_path, put(tmp_path / 'x.json', OLD), [put(tmp_path / 'meta', [row, *map(repr, META[1:])])])
  assert histories.load(tmp_path / 'out').items[0] == {'title': '', 'category': 'A', 'brand': '', 'price': ''}


@pytest.mark.parametrize('line', [b'{"a": 1}', b'{"a": "\\/"}', "{'a': \"é\", 'b': None, 'c': True, 'd': '\\/'}".encode()])
def test_json_is_read_as_json_and_python_as_python(line):
  want = json.loads(line) if line.startswith(b'{"') else ast.literal_eval(line.decode())
  assert dump_formats.read_object(line) == want


# The columns of a CSV.

def test_columns_that_cannot_be_told_are_asked_for(tmp_path):
  path = put(tmp_path / 'x.csv', [f'{user},{number},5,{time}' for number, (user, _, time) in enumerate(EVENTS)])
  told(tmp_path, path, 'x.csv', 'cannot be told which column', '--csv_columns')
  swapped = put(tmp_path / 'both.csv', [f'{asin},{asin},5,{time}' for _, asin, time in EVENTS])
  told(tmp_path, swapped, 'both.csv', '100% of the first', '--csv_columns')
  told(tmp_path, put(tmp_path / 'few.csv', ['a,b,1']), '3 columns', '--csv_columns')
  description = prepare(tmp_path, put(tmp_path / 'own.csv', [f'{time},-,{user[:4]},i{asin}' for user, asin, time in EVENTS]),
                        csv_columns='time,-,user,item')
  assert description['statistics']['users'] == 6 and description['options']['csv_columns'] == 'time,-,user,item'


@pytest.mark.parametrize('columns', ['user,item', 'user,item,time,stars', 'user,user,item,time', ''])
def test_columns_that_mean_nothing(columns):
  with pytest.raises(UserError, match='--csv_columns .*name the columns'):
    dump_rules.Rules(csv_columns=columns)


@pytest.mark.parametrize(('line', 'words'), [
    ('a,b,5', '3 columns, where 4'), ('"a,b,5,1', 'no CSV'), (',B00XABCDEF,5,1', '"user" is \'\', where an id'),
    ('A1,B00XABCDEF,5,1.5', '"time" is \'1.5\', where whole seconds'), ('A1,B00XABCDEF,5,2014-01-01', 'where whole seconds'),
    ('A1,B00XABCDEF,5,', 'where whole seconds'), (b'\xff,B00XABCDEF,5,1', 'no CSV'), ('A\0,B00XABCDEF,5,1', 'where an id'),
    ('A1,B00XABCDEF,5,99999999999999999999', 'where whole seconds')])
def test_a_bad_line_of_a_csv_is_named_or_tolerated(tmp_path, line, words):
  path = put(tmp_path / 'x.csv', [*RATINGS[:3], '', line, *RATINGS[3:]])
  told(tmp_path, path, 'x.csv: line 5: ', words, '--max_bad_lines')
  description = prepare(tmp_path, path, max_bad_lines=1)
  assert (description['bad_lines'], description['steps'][0]['events']) == (1, len(RATINGS))


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
  path = put(tmp_path / 'x.csv', ['user_id,user_id,parent_asin,timestamp', *RATINGS])
  told(tmp_path, path, 'x.csv', "2 columns 'user_id'", 'different names')


def test_quotes_of_a_csv_are_not_part_of_its_ids(tmp_path):
  prepare(tmp_path, put(tmp_path / 'x.csv', RATINGS))
  quoted = put(tmp_path / 'y.csv', [f'"{user}","{asin}",5.0,{time}' for user, asin, time in EVENTS])
  assert prepare(tmp_path, quoted, out='y')['fingerprint'] == histories.load(tmp_path / 'out').fingerprint


def test_the_first_bad_lines_that_are_tolerated_are_named(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    prepare(tmp_path, put(tmp_path / 'x.json', ['{', *OLD[:5], {'asin': 'B'}, *OLD[5:], '[]', 'x']), max_bad_lines=4)
  assert 'x.json: 4 bad lines are passed over; the first: line 1: not JSON' in caplog.text
  assert 'line 7: "reviewerID" is missing; line 39: a JSON list' in caplog.text and 'line 40' not in caplog.text


# Time.

@pytest.mark.parametrize(('times', 'words'), [
    (['2014-01-01'], "line 37: \"unixReviewTime\" is '2014-01-01', where whole seconds"),
    ([1_400_000_000_000], 'in milliseconds, such as 1400000000000, and in seconds, such as 1400000000'),
    ([1_400_000_000_000_000], 'neither seconds nor milliseconds')])
def test_times_that_would_be_wrong(tmp_path, times, words):
  told(tmp_path, put(tmp_path / 'x.json', OLD + [OLD[0] | {'unixReviewTime': time} for time in times]), 'x.json', words)


def test_milliseconds_are_told_in_any_format_and_order_events(tmp_path):
  rows = [row | {'unixReviewTime': 1_400_000_000_000 + 10 * place} for place, row in enumerate(OLD[::-1])]
  description = prepare(tmp_path, put(tmp_path / 'x.json', [*rows[::-1], OLD[0] | {'unixReviewTime': 0}]), min_length=1)
  data = histories.load(tmp_path / 'out')
  assert [data.item_ids[item] for item in data.history(1)] == ASINS[::-1]  # the last line's event is the earliest
  assert [data.item_ids[item] for item in data.history(0)] == [ASINS[0], *ASINS[::-1]]  # 0 is 0 in any unit
  assert set(data.timestamps.tolist()) == {0, 1_400_000_000} and description['sources'][0]['time'] == 'milliseconds'


@pytest.mark.parametrize('value', ['2014-02-30', '20140101', '2014', 'yesterday', '1400000000000', '1.5'])
def test_bounds_in_time_that_mean_nothing(value):
  with pytest.raises(UserError, match='--since'):
    dump_rules.Rules(since=value)


@pytest.mark.parametrize('options', [
    {'core': 'twice'}, {'dedup': 'all'}, {'since': '2015-01-01', 'until': '2014-01-01'}, {'min_rating': float('nan')},
    {'category_depth': 0}])
def test_rules_that_mean_nothing(options):
  with pytest.raises(UserError):
    dump_rules.Rules(**options)


def test_bounds_in_time(tmp_path):
  path = put(tmp_path / 'x.json', OLD)
  prepare(tmp_path, path, since='2014-05-14', until=str(1_400_000_000 + 4 * DAY), min_count=0)
  assert set(histories.load(tmp_path / 'out').timestamps.tolist()) == {1_400_000_000 + place * DAY for place in (1, 2, 3)}


# Bad dumps.

@pytest.mark.parametrize(('options', 'words'), [
    ({'since': '2020-01-01'}, ('since 1577836800 s', '--since')), ({'until': '2010-01-01'}, ('until', '--until')),
    ({'verified_only': True}, ('verified purchases', 'do not say which')), ({'min_rating': 5.5}, ('at least 5.5 stars',)),
    ({'min_count': 7, 'core': 'once'}, ('at least 7 events, once', '--min_count'))])
def test_nothing_left_names_the_filter(tmp_path, options, words):
  told(tmp_path, put(tmp_path / 'x.json', OLD), 'Nothing is left: step "', 'dropped the last 36 events', *words, **options)


@pytest.mark.parametrize('lines', [OLD, RATINGS], ids=['json', 'csv'])
@pytest.mark.parametrize(('mark', 'end'), [('\ufeff', '\n'), ('', '\r\n'), ('\ufeff', '\r\n')])
def test_marks_of_byte_order_and_carriage_returns(tmp_path, lines, mark, end):
  prepare(tmp_path, put(tmp_path / 'plain', lines))
  first = mark + (lines[0] if isinstance(lines[0], str) else json.dumps(lines[0]))
  path = put(tmp_path / 'marked', [first, *lines[1:]], end)
  assert prepare(tmp_path, path, out='marked_out')['fingerprint'] == histories.load(tmp_path / 'out').fingerprint
  broken = put(tmp_path / 'broken', [first, *lines[1:], '{"'], end)  # read in Python
  assert prepare(tmp_path, broken, out='o', max_bad_lines=1)['fingerprint'] == histories.load(tmp_path / 'out').fingerprint


def test_utf_16_is_refused(tmp_path):
  (tmp_path / 'x.csv').write_text('\n'.join(RATINGS), encoding='utf-16')
  told(tmp_path, tmp_path / 'x.csv', 'x.csv', 'UTF-16', 'UTF-8')


def test_a_folder_in_the_place_of_a_file(tmp_path):
  (tmp_path / 'x.json').mkdir()
  told(tmp_path, tmp_path / 'x.json', 'x.json: is a folder')
  told(tmp_path, put(tmp_path / 'y.json', OLD), 'x.json: is a folder', meta=[tmp_path / 'x.json'])


@pytest.mark.parametrize('as_meta', [False, True])
def test_a_line_without_end_is_refused_in_little_memory(tmp_path, monkeypatch, as_meta):
  monkeypatch.setattr(json_lines, 'MAX_LINE_BYTES', 1 << 20)
  bomb = tmp_path / 'bomb.json.gz'
  with gzip.open(bomb, 'wb', compresslevel=1) as file:
    file.write(json.dumps(OLD[0]).encode() + b'\n{"asin": "')
    for _ in range(64):
      file.write(bytes(1 << 20))
  good = put(tmp_path / 'x.json', OLD)
  tracemalloc.start()
  told(tmp_path, good if as_meta else bomb, 'bomb.json.gz: line 2: longer than 1 MiB', meta=[bomb] if as_meta else [],
       max_bad_lines=9)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 << 20


def test_a_line_longer_than_usual_is_read(tmp_path):
  rows = [row | {'reviewText': 'x' * (9 << 20) * (row is OLD[7])} for row in OLD]
  description = prepare(tmp_path, put(tmp_path / 'x.json.gz', rows))
  assert description['bad_lines'] == 0 and description['statistics']['events'] == len(OLD)


def test_metadata_for_no_item_and_items_without_metadata(tmp_path):
  path = put(tmp_path / 'x.json', OLD)
  others = put(tmp_path / 'meta_other.json', [{'asin': 'B00XXXXXXX', 'title': 'T'}])
  told(tmp_path, path, 'meta_other.json', 'describes none of the 6 items', ASINS[0], 'same category', meta=[others])
  description = prepare(tmp_path, path, [put(tmp_path / 'meta.json', META[:2])])
  assert description['metadata'] == {'lines': 2, 'repeated_lines': 0, 'items_without': 4}
  assert 'items without: 4' in describe.format_description(description)


def test_ids_that_differ_by_case_or_blanks_are_different_and_told(tmp_path):
  twins = [row | {'asin': asin} for asin in ('b001', 'B001', 'B 001', 'C', 'D') for row in OLD[:6]]
  description = prepare(tmp_path, put(tmp_path / 'x.json', twins))
  assert description['statistics']['items'] == 5 and description['similar_ids'] == {'users': 0, 'items': 3}
  assert '3 items differ from another one only by case or blanks' in describe.format_description(description)


def test_a_user_of_many_events(tmp_path):
  lines = [f'A9XKQRKQDOPQ2,{ASINS[number % 6]},5.0,{number // 7}' for number in range(100_000)]
  assert prepare(tmp_path, put(tmp_path / 'x.csv.gz', RATINGS + lines))['statistics']['length']['max'] == 100_000


def test_what_is_no_dump_of_reviews(tmp_path):
  told(tmp_path, put(tmp_path / 'meta.json', META), 'meta.json', 'no reviews that are known', '"asin", "title"', 'reviewerID')
  told(tmp_path, put(tmp_path / 'x.bin', [b'\xff,\xfe,\xff,']), 'x.bin', 'neither JSON lines nor a CSV')


# Room, and the same again.

def test_the_same_bytes_whatever_the_threads_and_the_memory(tmp_path):
  rng = np.random.default_rng(0)
  lines = [f'A{user:012},B{item:09},{stars}.0,{day}' for user, item, stars, day in rng.integers(
      [[1], [1], [1], [1]], [[4000], [900], [6], [9]], size=(4, 60_000)).T.tolist()]
  path, made = put(tmp_path / 'x.csv', lines), []
  for number, room in enumerate(({}, {'threads': 1}, {'threads': 4, 'memory_limit': '100MB', 'tmp_dir': tmp_path / 'tmp'})):
    prepare(tmp_path, path, out=f'out{number}', ties='hashed', **room)
    made.append([file.read_bytes() for file in sorted((tmp_path / f'out{number}').iterdir())])
  assert made[0] == made[1] == made[2] and len(made[0]) == 3
  assert os.listdir(tmp_path / 'tmp') == []


@pytest.mark.parametrize(('room', 'words'), [
    ({'memory_limit': '1MB'}, ('--memory_limit',)), ({'memory_limit': 'lots'}, ('--memory_limit lots', '2GB')),
    ({'threads': 0}, ('--threads 0',)), ({'tmp_dir': __file__}, ('--tmp_dir', 'test_dump_formats.py'))])
def test_too_little_room(tmp_path, room, words):
  told(tmp_path, put(tmp_path / 'x.json', OLD), *words, **room)


def test_an_unchanged_run_does_nothing_and_a_changed_one_is_refused(tmp_path, caplog):
  path, meta = put(tmp_path / 'x.json', OLD), put(tmp_path / 'meta.json', META)
  first = prepare(tmp_path, path, [meta], since='2014-01-01')
  times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / 'out').iterdir()}
  renamed = put(tmp_path / 'renamed.json', OLD)
  with caplog.at_level(logging.INFO):
    assert prepare(tmp_path, renamed, [meta], since=1388534400, threads=1) == first
  assert 'nothing is done' in caplog.text
  told(tmp_path, path, 'already in use', meta=[meta])
  told(tmp_path, path, 'already in use', since='2014-01-01')
  told(tmp_path, put(tmp_path / 'x.json', OLD[1:]), 'already in use', meta=[meta], since='2014-01-01')
  assert times == {file.name: file.stat().st_mtime_ns for file in (tmp_path / 'out').iterdir()}
  (tmp_path / 'out/sequences.jsonl.gz').unlink()
  told(tmp_path, renamed, 'already in use', meta=[meta], since='2014-01-01')
