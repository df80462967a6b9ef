"""One's own log, as sequences or as a table of events: bad files, bombs, kills, full disks, and room that changes nothing."""

import functools
import gzip
import json
import logging
import os
import subprocess
import sys
import time
import tracemalloc

import duckdb
import numpy as np
import pytest
import refusals

from calrec_jax import cli
from calrec_jax.data import events, histories, json_lines

ITEMS = [{'item_id': f'i{item}', 'title': f'Title {item}'} for item in range(4)]
SEQUENCES = [{'user_id': f'u{user}', 'item_ids': ['i0', 'i1', 'i2'], 'timestamps': [10, 20, 30]} for user in range(3)]
EVENTS = [{'user': f'u{user}', 'item': f'i{(user + step) % 4}', 'time': 1_600_000_000 + step, 'rating': step}
          for step in range(4) for user in range(3)]
ROWS = {'sequences': SEQUENCES, 'events': EVENTS}


def put(path, rows, end=b'\n'):
  """Writes objects as JSON lines, and bytes as they are."""
  content = b''.join((row if isinstance(row, bytes) else json.dumps(row).encode()) + end for row in rows)
  path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
  return path


def prepare(kind, path, items, out, **options):
  if kind == 'sequences':
    return histories.prepare(path, items, name='x', out=out, progress=False, **options)
  return events.prepare_events([path], items, name='x', out=out, progress=False, **options)


def told(tmp_path, kind, path, items, *words, **options):
  """It is refused in one line of these words, and nothing is left behind."""
  before = sorted(os.listdir(tmp_path))
  refusals.refused(lambda: prepare(kind, path, items, tmp_path / 'out', **options), *words)
  assert sorted(os.listdir(tmp_path)) == before


KINDS = pytest.mark.parametrize('kind', ROWS)


# Files.

@KINDS
def test_the_first_bad_lines_that_are_tolerated_are_named(tmp_path, caplog, kind):
  rows = ROWS[kind]
  odd = {'sequences': {'user_id': 'v'}, 'events': {'user': 'v', 'item': 'i0', 'time': 'late'}}[kind]
  path = put(tmp_path / 'log.jsonl', [rows[0], odd, *rows[1:], b'{', odd, b'[]'])
  items = put(tmp_path / 'items.jsonl', [ITEMS[0], {'item_id': {'n': 'x' * 999}}, *ITEMS[1:]])
  told(tmp_path, kind, path, items, 'log.jsonl', '3 tolerated', 'tolerate it with --max_bad_lines', max_bad_lines=3)
  with caplog.at_level(logging.INFO):
    prepare(kind, path, items, tmp_path / 'out', max_bad_lines=4)
  assert 'log.jsonl: 4 bad lines are passed over; the first: ' in caplog.text and 'items.jsonl: 1 bad lines' in caplog.text
  wanted = {'sequences': ['line 2: "item_ids" is missing', 'line 5: not JSON', 'line 6: "item_ids"'],
            'events': ['line 14: not JSON', 'line 16: a JSON list', "row 2: 'time' is 'late'"]}[kind]
  assert all(word in caplog.text for word in wanted) and caplog.text.count('"item_ids"') <= 2
  assert caplog.text.count("'time'") <= 1 and max(map(len, caplog.text.splitlines())) < 500


@KINDS
@pytest.mark.parametrize('as_items', [False, True])
@pytest.mark.parametrize('words', ['is truncated or damaged', 'is not gzip', 'is a folder', 'no such file'])
def test_wrong_gzip_and_what_is_no_file(tmp_path, kind, as_items, words):
  rows = (ROWS[kind], ITEMS) if as_items else (ITEMS, ROWS[kind])
  good, bad = put(tmp_path / 'good.jsonl', rows[0]), put(tmp_path / 'bad.jsonl.gz', rows[1])
  content = bad.read_bytes()
  bad.unlink()
  if words == 'is a folder':
    bad.mkdir()
  elif words != 'no such file':
    bad.write_bytes(content[:-9] if 'truncated' in words else gzip.decompress(content))
  told(tmp_path, kind, *((good, bad) if as_items else (bad, good)), f'bad.jsonl.gz: {words}')


@KINDS
@pytest.mark.parametrize(('mark', 'end'), [(b'\xef\xbb\xbf', b'\n'), (b'', b'\r\n'), (b'\xef\xbb\xbf', b'\r\n')])
def test_marks_of_byte_order_and_carriage_returns(tmp_path, kind, mark, end):
  first, *rest = ROWS[kind]
  plain = prepare(kind, put(tmp_path / 'plain', ROWS[kind]), put(tmp_path / 'items', ITEMS), tmp_path / 'out')
  log = put(tmp_path / 'marked', [mark + json.dumps(first).encode(), *rest], end)
  items = put(tmp_path / 'marked_items', [mark + json.dumps(ITEMS[0]).encode(), *ITEMS[1:]], end)
  assert prepare(kind, log, items, tmp_path / 'other')['fingerprint'] == plain['fingerprint']


def test_a_user_of_100_000_events(tmp_path):
  row = {'user_id': 'bot', 'item_ids': [f'i{n * n % 4}' for n in range(100_000)],
         'timestamps': [n // 7 for n in range(100_000)]}
  description = prepare('sequences', put(tmp_path / 's.jsonl', [row]), put(tmp_path / 'i.jsonl', ITEMS), tmp_path / 'out')
  assert description['statistics']['length'] == {'mean': 100_000.0, 'min': 100_000, 'max': 100_000}
  data = histories.load(tmp_path / 'out')
  assert [data.item_ids[item] for item in data.events] == row['item_ids'] and data.timestamps.tolist() == row['timestamps']


@pytest.mark.parametrize(('options', 'words'), [
    ({'min_rating': 9}, ['step "rating of at least 9" dropped the last 12 events', '--min_rating']),
    ({'unknown_items': 'drop'}, ['step "items without texts" dropped the last 12', 'the same way']),
    ({'unknown_items': 'keep', 'min_count': 9}, ['step "k-core, at least 9 events" dropped the last 12', '--min_count']),
    ({'unknown_items': 'keep', 'min_length': 9}, ['step "histories shorter than 9" dropped the last 12', '--min_length'])])
def test_nothing_left_names_the_step_that_emptied_it(tmp_path, options, words):
  others = put(tmp_path / 'items.jsonl', [{'item_id': item['item_id'].upper(), 'title': 'T'} for item in ITEMS])
  told(tmp_path, 'events', put(tmp_path / 'e.jsonl', EVENTS), others, 'Nothing is left: ', *words, **options)


# Bombs.

@KINDS
@pytest.mark.parametrize('as_items', [False, True])
def test_a_line_without_end_is_refused_in_little_memory(tmp_path, monkeypatch, kind, as_items):
  monkeypatch.setattr(json_lines, 'MAX_LINE_BYTES', 1 << 20)
  bomb, good = tmp_path / 'bomb.jsonl.gz', put(tmp_path / 'good.jsonl', ITEMS if not as_items else ROWS[kind])
  with gzip.open(bomb, 'wb', compresslevel=1) as file:
    file.write(json.dumps((ITEMS if as_items else ROWS[kind])[0]).encode() + b'\n{"user": "')
    for _ in range(64):
      file.write(bytes(1 << 20))
  tracemalloc.start()
  told(tmp_path, kind, *((good, bomb) if as_items else (bomb, good)), 'bomb.jsonl.gz: line 2: longer than 1 MiB',
       max_bad_lines=9)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 << 20


# The kernel's own count of this program; what getrusage tells begins with that of the process that started it.
PEAK = ('import pathlib, re, sys\nfrom calrec_jax import cli\ncode = cli.main(sys.argv[1:])\n'
        'print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1], file=sys.stderr)\n'
        'sys.exit(code)')


@pytest.mark.parametrize('kind', ['dumps', 'events', 'sequences', 'csv'])
def test_a_bomb_is_refused_below_the_memory_limit(tmp_path, kind):
  """2 GB of zeros in some MB, as a process that may take 500 MB sees it."""
  zeros = gzip.compress(bytes(1 << 26), compresslevel=1, mtime=0)
  bomb = tmp_path / ('bomb.csv.gz' if kind == 'csv' else 'bomb.json.gz')
  head = b'user,item,time\n' if kind == 'csv' else json.dumps(SEQUENCES[0]).encode() + b'\n'
  with bomb.open('wb') as file:
    file.write(gzip.compress(head + b'{"reviewerID": "'))
    for _ in range(32):
      file.write(zeros)
  items = str(put(tmp_path / 'items.jsonl', ITEMS))
  words = {'dumps': ['dumps', '--reviews', str(bomb), '--memory_limit', '500MB'],
           'sequences': ['histories', '--sequences', str(bomb), '--items', items]}.get(
               kind, ['histories', '--events', str(bomb), '--items', items, '--memory_limit', '500MB'])
  done = subprocess.run([sys.executable, '-c', PEAK, 'prepare', *words, '--name', 'x', '--out', str(tmp_path / 'out')],
                        capture_output=True, text=True, check=False)
  error, peak_kb = done.stderr.splitlines()[-2:]
  assert done.returncode == 2 and 'line 2: longer than 64 MiB' in error, done.stderr
  assert int(peak_kb) < 500_000 and not (tmp_path / 'out').exists()


# Stops.

@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  """{kind: words of a command without --out} whose run takes a while."""
  folder = tmp_path_factory.mktemp('stops')
  items = put(folder / 'items.jsonl', [{'item_id': f'i{item}', 'title': f'Title {item}'} for item in range(500)])
  user, item, day = np.random.default_rng(0).integers([[3000], [500], [50]], size=(3, 60_000)).tolist()
  table = folder / 'events.csv'
  table.write_text('user,item,time\n' + ''.join(f'u{u},i{i},{1_600_000_000 + 86_400 * d}\n'
                                                for u, i, d in zip(user, item, day, strict=True)))
  rows = [{'user_id': f'u{u}', 'item_ids': [f'i{i}' for i in item[u:u + 20]]} for u in range(3000)]
  command = ['prepare', 'histories', '--items', str(items), '--name', 'x']
  return {'events': [*command, '--events', str(table)],
          'sequences': [*command, '--sequences', str(put(folder / 'sequences.jsonl', rows))]}


def state(folder):
  return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@KINDS
def test_killed_at_any_moment_and_started_again(shop, tmp_path, kind):
  assert cli.main([*shop[kind], '--out', str(tmp_path / 'whole')]) == 0
  for number, seconds in enumerate((0.4, 0.55, 0.7, 0.85)):
    out = tmp_path / f'killed{number}'
    with subprocess.Popen([sys.executable, '-m', 'calrec_jax.cli', *shop[kind], '--out', str(out)], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
      time.sleep(seconds)
      process.kill()
    if out.exists():
      histories.load(out)  # whole
    assert cli.main([*shop[kind], '--out', str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / 'whole').iterdir()}


@KINDS
def test_a_full_disk_is_told_and_leaves_what_was_there(shop, tmp_path, kind):
  assert cli.main([*shop[kind], '--out', str(tmp_path / 'data/old')]) == 0
  before = state(tmp_path / 'data/old')
  limited = ('import resource, sys\nfrom calrec_jax import cli\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))\n'
             'sys.exit(cli.main(sys.argv[1:]))')
  done = subprocess.run([sys.executable, '-c', limited, *shop[kind], '--out', str(tmp_path / 'data/new')], capture_output=True,
                        text=True, check=False)
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and last.startswith('calrec: error: ') and 'make room' in last, done.stderr
  assert 'Traceback' not in done.stderr and state(tmp_path / 'data/old') == before
  assert os.listdir(tmp_path / 'data') == ['old']


# Room changes nothing.

@functools.cache
def many_events():
  """300,000 events of few times, so that the order of the rows decides."""
  return np.random.default_rng(1).integers([[5_000], [97], [3]], size=(3, 300_000))


@pytest.mark.parametrize('form', ['csv', 'jsonl', 'parquet'])
def test_rows_keep_their_order_in_a_table_that_is_read_in_parallel(tmp_path, form):
  """Larger than the parts into which DuckDB cuts it, with 32 MiB of a text, and a group of rows of Parquet."""
  users_E, items_E, times_E = many_events()
  path, padding = tmp_path / f'e.{form}', 'x' * 120
  table = {'user': users_E, 'item': items_E, 'time': times_E + 1_600_000_000}
  connection = duckdb.connect()
  connection.register('found', table)
  kind = {'csv': '(FORMAT csv)', 'jsonl': '(FORMAT json)', 'parquet': '(FORMAT parquet, ROW_GROUP_SIZE 4096)'}[form]
  connection.execute(f"COPY (SELECT *, '{padding}' AS padding FROM found) TO '{path}' {kind}")
  items = put(tmp_path / 'items.jsonl', [{'item_id': str(item), 'title': 'T'} for item in range(97)])
  for threads in (1, 4):
    prepare('events', path, items, tmp_path / f'out{threads}', threads=threads, dedup='none', min_length=1)
  assert [(tmp_path / 'out1' / name).read_bytes() for name in sorted(os.listdir(tmp_path / 'out1'))] == [
      (tmp_path / 'out4' / name).read_bytes() for name in sorted(os.listdir(tmp_path / 'out4'))]
  data = histories.load(tmp_path / 'out4')
  order_E = np.lexsort((np.arange(len(users_E)), times_E, users_E))
  found = dict(zip(data.user_ids, np.split(data.events, data.offsets[1:-1]), strict=True))
  expected = dict(zip(map(str, range(5_000)), np.split(items_E[order_E], np.cumsum(np.bincount(users_E))[:-1]), strict=True))
  for user in map(str, range(0, 5_000, 7)):
    assert [int(data.item_ids[item]) for item in found[user]] == expected[user].tolist()
