"""An unchanged run of `prepare histories` does nothing, and says so; a changed one is not taken for it."""

import json
import logging

import pytest
import refusals

from calrec_jax import cli
from calrec_jax.data import events, histories

ITEMS = [{'item_id': f'i{item}', 'title': f'Title {item}', 'name': f'Name {item}', 'category': 'C'} for item in range(3)]
SEQUENCES = [{'user_id': f'u{user}', 'item_ids': ['i0', 'i1', 'i2'], 'timestamps': [10, 20, 3000]} for user in range(3)]
HEAD = {'csv': 'user,item,time,day,rating\n', 'tsv': 'user\titem\ttime\tday\trating\n', 'inter':
        'user:token\titem:token\ttime:float\tday:token\trating:float\n', 'jsonl': ''}


def state(folder):
  return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def log(path, form, n_users=3):
  """An events table of histories of three items."""
  between = ',' if form == 'csv' else '\t'
  rows = [{'user': f'u{user}', 'item': f'i{step}', 'time': 1_600_000_000 + step, 'day': f'2014-01-0{step + 1}',
           'rating': 3 + step} for user in range(n_users) for step in range(3)]
  path.write_text(HEAD[form] + ''.join((json.dumps(row) if form == 'jsonl' else between.join(map(str, row.values()))) + '\n'
                                       for row in rows))
  return path


def same_again(first, again, changes, out, caplog):
  """`again` does nothing in one line; each of `changes` is refused as `out` is in use; nothing changes there."""
  before = state(out)
  with caplog.at_level(logging.INFO):
    caplog.clear()
    assert again() == first
  assert [record.getMessage() for record in caplog.records] == [
      f'{out}: already made of these files by these rules; nothing is done.']
  caplog.clear()
  for change in changes:
    refusals.refused(change, str(out), 'already in use')
  assert 'nothing is done' not in caplog.text and state(out) == before


def test_sequences(tmp_path, caplog):
  out, items = tmp_path / 'out', lines(tmp_path / 'items.jsonl', ITEMS)
  make = lambda rows=SEQUENCES, shop=items, **options: histories.prepare(
      lines(tmp_path / 'sequences.jsonl', rows), shop, out=out, progress=False, **{'name': 'x', **options})
  other = lines(tmp_path / 'other.jsonl', ITEMS[::-1])
  changes = [lambda options=options: make(**options) for options in (
      {'min_length': 2}, {'max_bad_lines': 1}, {'ties': 'hashed'}, {'split': 'time'}, {'name': 'y'}, {'rows': SEQUENCES[::-1]},
      {'shop': other})]
  first = make()
  same_again(first, make, changes, out, caplog)
  renamed = items.rename(tmp_path / 'renamed.jsonl')
  same_again(first, lambda: make(shop=renamed), [], out, caplog)
  refusals.refused(make, 'items.jsonl: no such file')


@pytest.mark.parametrize('form', HEAD)
def test_events(tmp_path, caplog, form):
  out, items, table = tmp_path / 'out', lines(tmp_path / 'items.jsonl', ITEMS), log(tmp_path / f'e.{form}', form)
  columns = {'event_columns': {'time': 'time'}, 'item_columns': {'title': 'title'}}
  make = lambda tables=(table,), shop=items, **options: events.prepare_events(
      tables, shop, out=out, progress=False, **{'name': 'x', **columns, **options})
  first = make()
  other, more = lines(tmp_path / 'other.jsonl', ITEMS[::-1]), log(tmp_path / f'more.{form}', form, n_users=4)
  changes = [lambda options=options: make(**options) for options in (
      {'min_count': 2}, {'min_rating': 3}, {'min_length': 2}, {'max_bad_lines': 1}, {'ties': 'hashed'}, {'split': 'time'},
      {'dedup': 'first'}, {'unknown_items': 'keep'}, {'all_items': True}, {'time_unit': 'seconds'}, {'name': 'y'},
      {'event_columns': {'time': 'day'}}, {'item_columns': {'title': 'name'}},
      {'item_columns': {'title': 'title', 'category': ''}}, {'shop': other}, {'tables': (more,)}, {'tables': (table, table)})]
  same_again(first, lambda: make(threads=1, memory_limit='100MB', tmp_dir=tmp_path / 'work'), changes, out, caplog)
  told = {'event_columns': {'user': 'user', 'item': 'item', 'time': 'time'}}
  same_again(first, lambda: make(**told), [], out, caplog)  # named now, and the same
  refusals.refused(lambda: make(event_columns={'time': 'hour'}), "no column 'hour'")


def test_a_folder_that_is_not_whole_or_made_otherwise(tmp_path, caplog):
  items, table = lines(tmp_path / 'items.jsonl', ITEMS), log(tmp_path / 'e.csv', 'csv')
  made = {'events': lambda: events.prepare_events([table], items, name='x', out=tmp_path / 'out', progress=False,
                                                  event_columns={'time': 'time'}, item_columns={'title': 'title'}),
          'sequences': lambda: histories.prepare(lines(tmp_path / 's', SEQUENCES), items, name='x', out=tmp_path / 'out',
                                                 progress=False)}
  made['events']()
  refusals.refused(made['sequences'], 'already in use')
  (tmp_path / 'out/items.jsonl.gz').unlink()
  refusals.refused(made['events'], 'already in use')
  (tmp_path / 'out/items.jsonl.gz').touch()
  (tmp_path / 'out/dataset.json').write_text('{')
  refusals.refused(made['events'], 'dataset.json', 'restore')


def test_the_command_line(tmp_path, capsys, caplog):
  caplog.set_level(logging.INFO)
  items, table = lines(tmp_path / 'items.jsonl', ITEMS), log(tmp_path / 'e.csv', 'csv')
  sequences = lines(tmp_path / 'sequences.jsonl', SEQUENCES)
  for out, words in (('one', ['--events', str(table), '--time_column', 'time', '--item_columns', 'title=title']),
                     ('two', ['--sequences', str(sequences)])):
    command = ['prepare', 'histories', '--items', str(items), '--name', 'x', '--out', str(tmp_path / out), *words]
    printed = []
    for _ in range(2):
      assert cli.main(command) == 0
      printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and caplog.text.count('nothing is done') == 1
    caplog.clear()
