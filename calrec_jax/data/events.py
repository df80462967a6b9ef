"""An events table (who, what, when) becomes a histories folder.

The steps, in this order:
  1. The rows of the tables, several files as one; ids are texts, and differ by every letter and blank.
  2. Rows with a rating below `min_rating` go; events of items without texts, if the user wants it so.
  3. Iterative k-core: users and items with fewer than `min_count` events go, until none is left to go.
  4. A user's events are ordered by (time, row), or (time, hash, row); times are compared as finely as they are written.
  5. Repeats go, as `dedup` says; then histories shorter than `min_length`.
  6. Items: those that a history holds, by id; or all of the items table.

DuckDB reads, sorts and joins, on disk where memory is short. What is left is as large as `histories.Histories`.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import duckdb
import numpy as np
import tqdm

from calrec_jax import outputs
from calrec_jax.data import (
  cleaning,
  columns,
  database,
  filtering,
  histories,
  json_lines,
  layouts,
  tables,
  time_order,
  time_units,
)
from calrec_jax.errors import UserError

UNKNOWN_ITEMS = ('refuse', 'keep', 'drop')
_NANOSECONDS = 10**9


def prepare_events(events: Sequence[str | os.PathLike], items: str | os.PathLike, *, name: str, out: str | os.PathLike,
                   event_columns: Mapping[str, str] | None = None, item_columns: Mapping[str, str] | None = None,
                   time_unit: str = 'auto', min_count: int = 0, min_rating: float | None = None, dedup: str = 'consecutive',
                   min_length: int = 3, unknown_items: str = 'refuse', all_items: bool = False, max_bad_lines: int = 0,
                   ties: str = 'dump', split: str = 'leave_one_out', memory_limit: str | None = None,
                   threads: int | None = None, tmp_dir: str | os.PathLike | None = None, progress: bool = True) -> dict:
  """Makes the histories folder `out` from a table of events and a table of items, in any form that `tables` reads.

  Where `out` is what these files, columns and options make, nothing is done (`histories.made_before`).

  Args:
    events: the files; of each row are needed a user's id, an item's id and a time.
    items: the file; of each row are needed an item's id and a title.
    name: of the data set.
    out: the new folder; it appears whole or not at all.
    event_columns: the names of columns by `user`, `item`, `time`, `rating`; those left out are told by usual names.
    item_columns: the same by `item_id`, `title`, `category`, `brand`, `price`; '': there is none.
    time_unit: one of `time_units.UNITS`.
    min_count: the k of the k-core, in events; 0 for none.
    min_rating: rows with a lower rating go; None: ratings are not read.
    dedup: which of a user's repeats go: see `filtering.drop_repeats`.
    min_length: shorter histories are dropped and counted.
    unknown_items: if items with events have no texts: `refuse`, `keep` them with unknown texts, or `drop` the events.
    all_items: whether items without events are kept too.
    max_bad_lines: rows of each file that may be broken: not readable, without id, without time.
    ties: the order of a user's events of one time: `dump`, that of the rows; or `hashed`, see `time_order`.
    split: `leave_one_out`, or `time`: see `time_order.cutoffs`.
    memory_limit: what DuckDB may take, such as '4GB'; None: its own choice.
    threads: of DuckDB; None: its own choice. The result does not depend on it.
    tmp_dir: a folder for DuckDB's files; None: beside `out`.
    progress: whether to show progress on stderr.

  Returns:
    The description, as in dataset.json.

  Raises:
    UserError: bad input, nothing left, `out` in use, or too little memory or disk.
  """
  histories.check_name(name)
  time_order.check_options(ties, split)
  for option, value, choices in (('dedup', dedup, tuple(filtering.DEDUP)), ('unknown_items', unknown_items, UNKNOWN_ITEMS),
                                 ('time_unit', time_unit, time_units.UNITS)):
    if value not in choices:
      raise UserError(f'{option} = {value!r}: choose one of {", ".join(choices)}.')
  if min_rating is not None and not math.isfinite(min_rating):
    raise UserError(f'--min_rating {min_rating}: is no rating.')
  options = {'min_count': min_count, 'min_rating': min_rating, 'min_length': min_length, 'max_bad_lines': max_bad_lines,
             'ties': ties, 'split': split, 'repeats': filtering.DEDUP[dedup], 'time_unit': time_unit,
             'unknown_items': unknown_items, 'all_items': all_items}
  event_columns, item_columns, rated = event_columns or {}, item_columns or {}, min_rating is not None
  named = lambda: _columns(events, items, event_columns, item_columns, rated=rated)
  if known := histories.made_before(out, [*events, items], name=name, options=options, progress=progress,
                                    agrees=lambda description: description.get('columns') == named()):
    return known
  with outputs.new_folder(out) as scratch:
    bar = tqdm.tqdm(total=len(events) + 4, desc=f'preparing {name}', leave=False, delay=1, disable=not progress)
    with bar, database.connect(tmp_dir or scratch, threads=threads, memory_limit=memory_limit) as (connection, work):
      log = _Log(connection, work, max_bad_lines, bar)
      times = log.read_events(events, event_columns, time_unit, rated=rated)
      shop = log.read_items(items, item_columns, all_items=all_items)
      steps = _filter(connection, min_count=min_count, min_rating=min_rating, min_length=min_length, dedup=dedup, ties=ties,
                      without_texts=shop.without_texts(connection) if unknown_items == 'drop' else [])
      bar.update()
      similar = filtering.similar_ids(connection)
      arrays = filtering.arrays(connection)
      timestamps = arrays['timestamps'] // _NANOSECONDS
      item_ids, numbers = shop.checked_ids(arrays['item_ids'], refuse=unknown_items == 'refuse', all_items=all_items)
      data = histories.Histories(
          name, arrays['user_ids'], item_ids, [shop.texts.get(item_id) or _UNKNOWN for item_id in item_ids], arrays['offsets'],
          numbers[arrays['events']], timestamps, time_order.cutoffs(timestamps, name) if split == 'time' else None)
    return histories.write(scratch, data, {
        'sources': [table.source.description() for table in log.tables],
        'columns': log.columns,
        'times': {'unit': times.unit, 'first': _date(timestamps.min()), 'last': _date(timestamps.max())},
        'options': options,
        'steps': steps,
        'bad_lines': log.n_bad,
        **({'similar_ids': similar} if any(similar.values()) else {}),
        'metadata': {'lines': log.tables[-1].source.lines, 'repeated_lines': shop.n_repeated,
                     'items_without': sum(item_id not in shop.texts for item_id in item_ids)},
    })


def _columns(events: Sequence[str | os.PathLike], items: str | os.PathLike, of_events: Mapping[str, str],
             of_items: Mapping[str, str], *, rated: bool) -> dict[str, str]:
  """The columns that dataset.json names of these tables, where the user named some."""
  found: dict[str, str] = {}
  for path in events:
    found |= columns.of_events(tables.column_names(path), os.fspath(path), of_events, rated=rated)
  return found | columns.of_items(tables.column_names(items), os.fspath(items), of_items)


_UNKNOWN = dict.fromkeys(histories.FIELDS, '')


@dataclasses.dataclass
class _Shop:
  """What the items table tells: the path, the texts by item id (none of which is all unknown), identical rows read again."""

  path: pathlib.Path
  texts: dict[str, dict[str, str]]
  n_repeated: int

  def without_texts(self, connection: duckdb.DuckDBPyConnection) -> list[str]:
    return [row[0] for row in connection.execute('SELECT id FROM items').fetchall() if row[0] not in self.texts]

  def checked_ids(self, bought: list[str], *, refuse: bool, all_items: bool) -> tuple[list[str], np.ndarray]:
    """The ids of the data set, sorted, and int32 [bought]: the number of each bought one among them.

    Raises UserError if bought ones have no texts, and that is to be refused.
    """
    absent = [item_id for item_id in bought if item_id not in self.texts]
    if refuse and absent:
      listed = '' if len(absent) < len(bought) or not self.texts else f' (it lists {min(self.texts)!r})'
      raise UserError(f'{self.path}: {len(absent):,} of the {len(bought):,} items with events have no texts there, such as '
                      f'{absent[0]!r}{listed}; add them, or keep them all the same with --unknown_items keep, or drop their '
                      'events with --unknown_items drop.')
    item_ids = sorted({*bought, *self.texts}) if all_items else bought
    number = {item_id: index for index, item_id in enumerate(item_ids)}
    return item_ids, np.array([number[item_id] for item_id in bought], np.int32)


class _Log:
  """Reads the tables into DuckDB's; keeps what was read, and the number of bad rows."""

  def __init__(self, connection: duckdb.DuckDBPyConnection, work: pathlib.Path, max_bad_lines: int, bar: tqdm.tqdm):
    self.connection, self.work, self.max_bad_lines, self.bar = connection, work, max_bad_lines, bar
    self.tables: list[tables.Table] = []
    self.columns: dict[str, str] = {}
    self.n_bad = 0

  def read_events(self, paths: Sequence[str | os.PathLike], given: Mapping[str, str], unit: str, *, rated: bool
                  ) -> time_units.Times:
    """Fills users(id, code), items(id, code), and events(user, item, time, line) with times in nanoseconds.

    `rated` adds the column `rating`.
    """
    if not paths:
      raise UserError('No events table is given; name at least one.')
    roles = ('user', 'item', 'time', *(['rating'] if rated else []))
    self.connection.execute(f'CREATE TABLE raw ({", ".join(f"{role} VARCHAR" for role in roles)})')
    parts = []
    for path in paths:
      table, bad = self._open(path)
      found = columns.of_events(table.columns, str(table.path), given, rated=rated)
      self.columns |= found
      begin = self._size('raw')
      tables.load(self.connection, table, [(found[role], 'id' if role in ('user', 'item') else 'text') for role in roles],
                  'raw', bad=bad, work=self.work)
      parts.append((found, bad, begin, self._size('raw')))
    if not self._size('raw'):
      raise UserError(f'{paths[0]}: holds no event.')
    times = time_units.recognise(self.connection, 'raw', unit, f'{self.tables[0].path}: column {parts[0][0]["time"]!r}')
    self.connection.execute(f"""
        CREATE TABLE parsed AS SELECT user, item, {times.sql} AS time{f', {_RATING} AS rating' if rated else ''}, rowid AS line
          FROM raw""")
    for found, bad, begin, end in parts:
      self._check_rows('raw', 'parsed', found, roles, bad, begin, end)
    self.connection.execute(f'DROP TABLE raw; CREATE VIEW good AS SELECT * FROM parsed WHERE {_all_there(roles)}')
    filtering.number_ids(self.connection, 'good', user='user', item='item')
    self.connection.execute("""
        CREATE TABLE events AS SELECT good.* REPLACE (users.code AS user, items.code AS item)
          FROM good JOIN users ON user = users.id JOIN items ON item = items.id;
        DROP VIEW good; DROP TABLE parsed""")
    self.bar.update()
    return times

  def read_items(self, path: str | os.PathLike, given: Mapping[str, str], *, all_items: bool) -> _Shop:
    """The cleaned texts of the items with events, or of all."""
    table, bad = self._open(path)
    found = columns.of_items(table.columns, str(table.path), given)
    self.columns |= found
    fields = [field for field in histories.FIELDS if field in found]
    self.connection.execute(f'CREATE TABLE texts (item_id VARCHAR, {", ".join(f"{field} JSON" for field in fields)})')
    tables.load(self.connection, table, [(found['item_id'], 'id'), *((found[field], 'json') for field in fields)], 'texts',
                bad=bad, work=self.work)
    self._check_rows('texts', 'texts', found, ['item_id'], bad, 0, self._size('texts'))
    separator = table.layout.lists.get(found.get('category')) if table.layout else None
    shop = _Shop(table.path, {}, 0)
    known: dict[str, dict[str, str]] = {}
    which = 'item_id IS NOT NULL' if all_items else 'item_id IN (SELECT id FROM items)'
    cursor = self.connection.execute(f'SELECT * FROM texts WHERE {which} ORDER BY rowid')
    while rows := cursor.fetchmany(10_000):
      for item_id, *values in rows:
        item = _UNKNOWN | {field: _cleaned(field, value, separator) for field, value in zip(fields, values, strict=True)}
        shop.n_repeated += item_id in known
        if known.setdefault(item_id, item) != item:
          raise UserError(f'{table.path}: item {item_id!r} is listed a second time, with other texts; list each item once.')
    shop.texts = {item_id: item for item_id, item in known.items() if any(item.values())}
    self.bar.update()
    return shop

  def _open(self, path: str | os.PathLike) -> tuple[tables.Table, json_lines.BadLines]:
    table = tables.inspect(path, progress=not self.bar.disable)
    self.tables.append(table)
    self.bar.update()
    return table, json_lines.BadLines(table.path, self.max_bad_lines)

  def _size(self, table: str) -> int:
    return self.connection.execute(f'SELECT count(*) FROM {table}').fetchone()[0]

  def _check_rows(self, raw: str, parsed: str, found: Mapping[str, str], roles: Sequence[str], bad: json_lines.BadLines,
                  begin: int, end: int) -> None:
    """Counts the rows of one file, `begin` up to `end` of the table `parsed`, in which something needed is NULL.

    Raises UserError, with the first one as the table `raw` has it, if there are too many bad ones; else logs the first ones.
    """
    wrong = f'rowid >= {begin} AND rowid < {end} AND NOT ({_all_there(roles)})'
    n_bad = self.connection.execute(f'SELECT count(*) FROM {parsed} WHERE {wrong}').fetchone()[0]
    if n_bad:
      first = self.connection.execute(f'SELECT rowid FROM {parsed} WHERE {wrong} ORDER BY rowid LIMIT 3').fetchall()
      bad.first += [f'row {row - begin + 1}: {self._fault(raw, parsed, found, roles, row)}' for row, in first]
      bad.count += n_bad
      if bad.count > self.max_bad_lines:
        more = f' ({bad.count:,} bad rows, {self.max_bad_lines} tolerated)' if self.max_bad_lines else ''
        raise UserError(f'{bad.path}: {bad.first[-len(first)]}{more}; repair it, or tolerate it with --max_bad_lines.')
    self.n_bad += bad.count
    del bad.first[3:]
    bad.tell()

  def _fault(self, raw: str, parsed: str, found: Mapping[str, str], roles: Sequence[str], row: int) -> str:
    """What makes a row of the table `parsed` bad, as the table `raw` has it."""
    read, there = (self.connection.execute(f'SELECT {", ".join(roles)} FROM {table} WHERE rowid = {row}').fetchone()
                   for table in (raw, parsed))
    role, value = next((role, value) for role, value, parsed in zip(roles, read, there, strict=True) if parsed is None)
    what = {'time': 'a time', 'rating': 'a number'}.get(role, 'an id (a text or a whole number)')
    shown = f'is {value[:80]!r}{"…" * (len(value) > 80)}, where' if value else 'is missing, or is not'
    return f'{found[role]!r} {shown} {what}{" is expected" * bool(value)}'


_RATING = 'CASE WHEN isfinite(TRY_CAST(rating AS DOUBLE)) THEN TRY_CAST(rating AS DOUBLE) END'


def _all_there(roles: Sequence[str]) -> str:
  return ' AND '.join(f'{role} IS NOT NULL' for role in roles)


def _cleaned(field: str, value: str | None, separator: str | None) -> str:
  """An attribute of an item, from its JSON. Texts are cleaned as those of ready sequences are."""
  value = None if value is None else json.loads(value)
  if isinstance(value, float) and not math.isfinite(value):
    return ''
  if field != 'category':
    return cleaning.plain_text(value)
  return cleaning.joined_levels(layouts.levels(value, separator) if separator and isinstance(value, str) else value)


def _filter(connection: duckdb.DuckDBPyConnection, *, min_count: int, min_rating: float | None, min_length: int, dedup: str,
            ties: str, without_texts: list[str]) -> list[dict]:
  """Filters the table events down to histories(user, item, time, rank); returns what each step left and dropped.

  Raises UserError, naming the step, when nothing is left.
  """
  steps = filtering.Steps(connection)
  steps.count('read', 'events', 'the events table holds no good row')
  if min_rating is not None:
    connection.execute('CREATE OR REPLACE TABLE events AS SELECT * EXCLUDE rating FROM events WHERE rating >= ?', [min_rating])
    steps.count(f'rating of at least {min_rating:g}', 'events', 'give a smaller --min_rating')
  if without_texts:
    connection.execute("""CREATE OR REPLACE TABLE events AS SELECT * FROM events
        WHERE item NOT IN (SELECT code FROM items WHERE id IN (SELECT unnest(?)))""", [without_texts])
    steps.count('items without texts', 'events', 'do the two tables write item ids the same way?')
  if min_count > 0:
    filtering.k_core(connection, min_count)
    steps.count(f'k-core, at least {min_count} events', 'events', 'give a smaller --min_count, or more events')
  filtering.drop_repeats(connection, ties, dedup)
  if dedup != 'none':
    steps.count('consecutive duplicates' if dedup == 'consecutive' else 'all but the first of an item', 'histories', 'a bug')
  filtering.drop_short(connection, min_length)
  steps.count(f'histories shorter than {min_length}', 'histories', 'give a smaller --min_length, or more events')
  return steps.rows


def _date(seconds: np.int64) -> str:
  return (datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=int(seconds))).isoformat(sep=' ')
