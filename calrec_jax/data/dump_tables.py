"""Dumps as DuckDB's tables: codes for ids, times in seconds, in the order of the lines.

DuckDB reads strictly; a file in which it finds anything unusual is gone through in Python line by line
(`dump_formats.rows`), which names the bad lines or, where they are tolerated, leaves them out.
"""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import duckdb
import tqdm

from calrec_jax import storage
from calrec_jax.data import cleaning, dump_formats, filtering, histories, json_lines, unpacking
from calrec_jax.data.dump_rules import Rules
from calrec_jax.data.time_order import MILLISECONDS
from calrec_jax.errors import UserError

_MICROSECONDS = 10**14  # from here on a time is not even in milliseconds
# DuckDB has room for several such lines a thread, which counts as memory; a file with a longer line is read in Python.
_USUAL_LINE_BYTES = 1 << 23
_JSON = {
    # The common case first, by the text of the JSON alone: parsing it again would cost as much as the line did.
    'id': r"""CASE WHEN starts_with({0}, '"') AND NOT contains({0}, '\') THEN nullif(substr({0}, 2, length({0}) - 2), '')
                   WHEN json_type({0}) = 'VARCHAR' AND NOT regexp_matches({0}, '\\u0000') THEN {0}->>'$' END""",
    'time': '''CASE WHEN NOT contains({0}, '.') AND NOT contains({0}, 'e') AND NOT contains({0}, 'E')
                    THEN TRY_CAST(CAST({0} AS VARCHAR) AS BIGINT) END''',
    'rating': "CASE WHEN json_type({0}) IN ('UBIGINT', 'BIGINT', 'DOUBLE') THEN TRY_CAST({0}->>'$' AS DOUBLE) END",
    'verified': "json_type({0}) = 'BOOLEAN' AND ({0}->>'$') = 'true'",
}
_CSV = {
    'id': """CASE WHEN {0} <> '' AND NOT contains({0}, '"') AND NOT contains({0}, chr(0)) THEN {0} END""",
    'time': "CASE WHEN regexp_full_match({0}, '-?[0-9]{{1,19}}') THEN TRY_CAST({0} AS BIGINT) END",
    'rating': r"CASE WHEN regexp_full_match({0}, '[0-9]+(\.[0-9]+)?') THEN TRY_CAST({0} AS DOUBLE) END",
}
_TYPES = {'user_id': 'VARCHAR', 'item_id': 'VARCHAR', 'time': 'BIGINT', 'rating': 'DOUBLE', 'verified': 'BOOLEAN'}


class Dumps:
  """Reads dumps into DuckDB's tables; keeps what is to be said of each file, and the number of bad lines."""

  def __init__(self, connection: duckdb.DuckDBPyConnection, work: pathlib.Path, rules: Rules, bar: tqdm.tqdm):
    self.connection, self.work, self.rules, self.bar = connection, work, rules, bar
    self.sources: list[dict] = []
    self.n_bad = 0

  def read_reviews(self, paths: Sequence[str | os.PathLike]) -> None:
    """Fills the table events(user, item, time, line, …) with codes for ids; a code's order is its id's."""
    columns = self.rules.columns
    more = ''.join(f', {column}' for column in columns[3:])
    self._create('lines', columns)
    places = dump_formats.csv_places(self.rules.csv_columns)
    fine = []  # files whose times are in milliseconds
    with self._unpack(paths) as files:
      for file in files:
        number = self._read(file, functools.partial(dump_formats.of_reviews, places=places), 'lines', columns)
        if self._in_milliseconds(file.path, number):
          fine.append(str(number))
    is_fine = f'file IN ({", ".join(fine)})' if fine else 'false'
    filtering.number_ids(self.connection, 'lines', user='user_id', item='item_id')
    self.connection.execute(f"""
        CREATE TABLE events AS SELECT users.code AS user, items.code AS item,
            CASE WHEN {is_fine} THEN time // 1000 ELSE time END AS time,
            CASE WHEN {is_fine} THEN (time % 1000) << {filtering.FRACTION_BITS} ELSE 0 END + lines.rowid AS line{more}
          FROM lines JOIN users ON user_id = users.id JOIN items ON item_id = items.id;
        DROP TABLE lines""")

  def read_items(self, paths: Sequence[str | os.PathLike], item_ids: list[str]) -> tuple[list[dict[str, str]], dict]:
    """The cleaned attributes of `item_ids`, and counts of what the metadata held.

    Raises UserError for metadata of which no line is of these items.
    """
    columns = dump_formats.META_COLUMNS
    self._create('meta', columns)
    counts = {'lines': 0, 'repeated_lines': 0, 'items_without': 0}
    with self._unpack(paths) as files:
      for file in files:
        self._read(file, dump_formats.of_meta, 'meta', columns)
        counts['lines'] += file.source.lines
    items: dict[str, dict[str, str]] = {}
    cleaners = _cleaners(self.rules)
    rows = self.connection.execute(f"""
        SELECT {', '.join(columns)} FROM meta
        WHERE item_id IN (SELECT id FROM items WHERE code IN (SELECT item FROM histories)) ORDER BY rowid""")
    while row := rows.fetchone():
      item_id, *values = row
      counts['repeated_lines'] += item_id in items
      if item_id not in items or not items[item_id]['title']:
        item = {field: clean(None if value is None else json.loads(value))
                for (field, clean), value in zip(cleaners.items(), values, strict=True)}
        if item_id not in items or item['title']:
          items[item_id] = item
    if paths and not items:
      raise UserError(f'{", ".join(str(path) for path in paths)}: describes none of the {len(item_ids):,} items, of which one '
                      f'is {item_ids[0]!r}; give the metadata of the same category, or none.')
    counts['items_without'] = len(item_ids) - len(items)
    return [items.get(item_id) or dict.fromkeys(histories.FIELDS, '') for item_id in item_ids], counts

  def _unpack(self, paths: Sequence[str | os.PathLike]) -> contextlib.AbstractContextManager[list[unpacking.Unpacking]]:
    [[threads]] = self.connection.execute("SELECT current_setting('threads')").fetchall()
    return unpacking.unpack([storage.local(path) for path in paths], self.work, threads=threads, progress=not self.bar.disable)

  def _create(self, table: str, columns: Sequence[str]) -> None:
    """Makes a table of lines, in their order, with the number of their file."""
    types = ', '.join(f'{column} {_TYPES.get(column, "JSON")}' for column in columns)
    self.connection.execute(f'CREATE TABLE {table} ({types}, file INTEGER)')

  def _read(self, file: unpacking.Unpacking, recognise: Callable[[pathlib.Path], dump_formats.Format], table: str,
            columns: Sequence[str]) -> int:
    """Appends the good lines of a file to a table, and returns the file's number."""
    number = len(self.sources)
    form = recognise(file.path)
    taken = not form.loose
    for place, piece in enumerate(file):
      taken = taken and self._load(piece, form, table, columns, number, header=form.header and place == 0)
    source = file.source
    self.sources.append(source.description() | dump_formats.named(source.path, form))
    n_lines = source.lines - (form.header and source.lines > 0)
    if not taken or self._count_good(table, columns, number) != n_lines:
      bad = json_lines.BadLines(source.path, self.rules.max_bad_lines)
      repaired = self.work / 'repaired.jsonl'
      with repaired.open('wb') as lines:
        for row in dump_formats.rows(source.path, form, columns, bad, progress=not self.bar.disable):
          lines.write(dump_formats.write_row(row))
      self.n_bad += bad.count
      bad.tell()
      self.connection.execute(f'DELETE FROM {table} WHERE file = {number}')
      self._load_repaired(repaired, table, columns, number)
      repaired.unlink()
    self.bar.update()
    return number

  def _load(self, piece: pathlib.Path, form: dump_formats.Format, table: str, columns: Sequence[str], number: int, *,
            header: bool) -> bool:
    """Appends to a table; returns False where DuckDB found a line that it does not take. What is no id or time is NULL."""
    selected = ', '.join(_selected(column, form) for column in columns)
    try:
      self.connection.execute(f'INSERT INTO {table} SELECT {selected}, {number} '
                              f'FROM {_table(piece, form, columns, header=header)}')
    except duckdb.InvalidInputException:
      return False
    return True

  def _load_repaired(self, path: pathlib.Path, table: str, columns: Sequence[str], number: int) -> None:
    """Appends lines that Python has written to a table."""
    types = {column: _TYPES[column] if column in ('user_id', 'item_id', 'time') else 'JSON' for column in columns}
    selected = [f'{_JSON[column].format(column)} AS {column}' if column in ('rating', 'verified') else column
                for column in columns]
    self.connection.execute(f'INSERT INTO {table} SELECT {", ".join(selected)}, {number} FROM '
                            f'{_read_json(path, types, json_lines.MAX_LINE_BYTES)}')

  def _count_good(self, table: str, columns: Sequence[str], number: int) -> int:
    """How many lines a table has of a file, if all have ids and a time that DuckDB reads as Python does; else -1."""
    needed = [f'{column} IS NOT NULL' for column in columns if column in (*dump_formats.IDS, 'time')]
    n_lines, n_good = self.connection.execute(
        f'SELECT count(*), count(*) FILTER ({" AND ".join(needed)}) FROM {table} WHERE file = {number}').fetchone()
    return n_good if n_good == n_lines else -1

  def _in_milliseconds(self, path: pathlib.Path, number: int) -> bool:
    """Whether a file's times are, and not in seconds; all of them tell. UserError: neither, or a mixture."""
    most, short, long = self.connection.execute(f"""
        SELECT max(time), min(time) FILTER (time <> 0 AND time < {MILLISECONDS}), min(time) FILTER (time >= {MILLISECONDS})
        FROM lines WHERE file = {number}""").fetchone()
    if long is None:
      return False
    if most >= _MICROSECONDS:
      raise UserError(f'{path}: holds the time {most}, which is in neither seconds nor milliseconds; convert its times to '
                      'seconds.')
    if short is not None:
      raise UserError(f'{path}: holds times in milliseconds, such as {long}, and in seconds, such as {short}; convert its '
                      'times to seconds.')
    self.sources[-1]['time'] = 'milliseconds'
    return True


def _cleaners(rules: Rules) -> Mapping[str, Callable[[object], str]]:
  """What makes the text of each attribute."""
  return {'title': cleaning.clean_text, 'category': functools.partial(cleaning.clean_category, depth=rules.category_depth),
          'brand': cleaning.clean_brand, 'price': (lambda value: '') if rules.no_price else cleaning.clean_price}


def _selected(column: str, form: dump_formats.Format) -> str:
  """A column of a file, as SQL."""
  kind = 'id' if column in dump_formats.IDS else column
  known = _CSV if form.places else _JSON
  if column not in form.fields:
    return f'CAST(NULL AS {_TYPES[column]}) AS {column}'
  source = f'"{column if form.places else form.fields[column]}"'
  return f'{known[kind].format(source) if kind in known else source} AS {column}'


def _table(path: pathlib.Path, form: dump_formats.Format, columns: Sequence[str], *, header: bool) -> str:
  """What reads a file, as SQL: JSON lines or a CSV without quotes."""
  if not form.places:
    return _read_json(path, dict.fromkeys((form.fields[column] for column in columns), 'JSON'))
  names = ', '.join(f"'{column or f'unread {place}'}': 'VARCHAR'" for place, column in enumerate(form.places))
  return (f"read_csv('{_quoted(path)}', columns={{{names}}}, auto_detect=false, delim=',', quote='', escape='', "
          f"header={str(header).lower()}, compression='none')")


def _read_json(path: pathlib.Path, types: Mapping[str, str], longest: int = _USUAL_LINE_BYTES) -> str:
  columns = ', '.join(f"'{name}': '{kind}'" for name, kind in types.items())
  return (f"read_json('{_quoted(path)}', format='newline_delimited', columns={{{columns}}}, compression='none', "
          f'maximum_object_size={longest})')


def _quoted(path: pathlib.Path) -> str:
  return str(path).replace("'", "''")
