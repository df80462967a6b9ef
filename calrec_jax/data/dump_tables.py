"""Dumps as DuckDB's tables: codes for ids, times in seconds, in the order of the lines.

DuckDB reads strictly; a file in which it finds anything unusual is gone through in Python line by line
(`dump_formats.rows`), which names the bad lines or, where they are tolerated, leaves them out.
"""

import functools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import duckdb
import tqdm

from calrec_jax import storage
from calrec_jax.data import cleaning, dump_formats, filtering, histories, json_lines
from calrec_jax.data.dump_rules import MILLISECONDS, Rules
from calrec_jax.errors import UserError

_MICROSECONDS = 10**14  # from here on a time is not even in milliseconds
# DuckDB has room for several such lines a thread, which counts as memory; a file with a longer line is read in Python.
_USUAL_LINE_BYTES = 1 << 23
_JSON = {
    'id': r"""CASE WHEN json_type({0}) = 'VARCHAR' AND NOT regexp_matches({0}, '^""$|\\u0000') THEN {0}->>'$' END""",
    'time': "CASE WHEN json_type({0}) IN ('UBIGINT', 'BIGINT') THEN TRY_CAST({0} AS BIGINT) END",
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
    more = self.rules.columns[3:]
    self.connection.execute('CREATE TABLE lines (user_id VARCHAR, item_id VARCHAR, time BIGINT, line BIGINT'
                            + ''.join(f', {column} {_TYPES[column]}' for column in more) + ')')
    places = dump_formats.csv_places(self.rules.csv_columns)
    for path in map(storage.local, paths):
      self._read(path, functools.partial(dump_formats.of_reviews, places=places), self.rules.columns)
      time = self._time_unit(path)
      fraction = '' if time == 'time' else f'((time % 1000) << {filtering.FRACTION_BITS}) + '
      self.connection.execute(f"""
          INSERT INTO lines SELECT user_id, item_id, {time},
            {fraction}(SELECT count(*) FROM lines) + row_number() OVER (){''.join(f', {column}' for column in more)} FROM dump;
          DROP TABLE dump""")
    self.connection.execute("""
        CREATE TABLE users AS SELECT user_id AS id, row_number() OVER (ORDER BY user_id) - 1 AS code
          FROM (SELECT DISTINCT user_id FROM lines);
        CREATE TABLE items AS SELECT item_id AS id, row_number() OVER (ORDER BY item_id) - 1 AS code
          FROM (SELECT DISTINCT item_id FROM lines);
        CREATE TABLE events AS SELECT users.code AS user, items.code AS item, lines.* EXCLUDE (user_id, item_id)
          FROM lines JOIN users ON user_id = users.id JOIN items ON item_id = items.id;
        DROP TABLE lines""")

  def read_items(self, paths: Sequence[str | os.PathLike], item_ids: list[str]) -> tuple[list[dict[str, str]], dict]:
    """The cleaned attributes of `item_ids`, and counts of what the metadata held.

    Raises UserError for metadata of which no line is of these items.
    """
    columns = dump_formats.META_COLUMNS
    self.connection.execute(f"""
        CREATE TABLE meta (item_id VARCHAR, {', '.join(f'{column} JSON' for column in columns[1:])}, line BIGINT);
        CREATE TABLE wanted AS SELECT id FROM items WHERE code IN (SELECT item FROM histories)""")
    counts = {'lines': 0, 'repeated_lines': 0, 'items_without': 0}
    for path in map(storage.local, paths):
      self._read(path, dump_formats.of_meta, columns)
      self.connection.execute(f"""
          INSERT INTO meta SELECT {', '.join(columns)}, (SELECT coalesce(max(line), 0) FROM meta) + number
          FROM (SELECT *, row_number() OVER () AS number FROM dump) WHERE item_id IN (SELECT id FROM wanted);
          DROP TABLE dump""")
      counts['lines'] += self.sources[-1]['lines']
    items: dict[str, dict[str, str]] = {}
    cleaners = _cleaners(self.rules)
    rows = self.connection.execute(f'SELECT {", ".join(columns)} FROM meta ORDER BY line')
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

  def _read(self, path: pathlib.Path, recognise: Callable[[pathlib.Path], dump_formats.Format],
            columns: Sequence[str]) -> None:
    """Makes the table `dump` of a file: its good lines, in order; attributes of items are of type JSON."""
    source = json_lines.inspect(path, progress=not self.bar.disable)
    form = recognise(source.path)
    self.sources.append(source.description() | dump_formats.named(path, form))
    n_lines = source.lines - (form.header and source.lines > 0)
    if form.loose or not self._load(source.path, form, columns, gzipped=source.gzipped) or self._count_good(columns) != n_lines:
      bad = json_lines.BadLines(source.path, self.rules.max_bad_lines)
      repaired = self.work / f'repaired-{len(self.sources)}.jsonl'
      with repaired.open('wb') as file:
        for row in dump_formats.rows(source.path, form, columns, bad, progress=not self.bar.disable):
          file.write(dump_formats.write_row(row))
      self.n_bad += bad.count
      if bad.count:
        logging.info('%s: %d bad lines are passed over; the first: %s.', path, bad.count, '; '.join(bad.first))
      self._load_repaired(repaired, columns)
      repaired.unlink()
    self.bar.update()

  def _load(self, path: pathlib.Path, form: dump_formats.Format, columns: Sequence[str], *, gzipped: bool) -> bool:
    """Makes the table `dump`; returns False where DuckDB found a line that it does not take. What is no id or time is NULL."""
    try:
      self.connection.execute('CREATE OR REPLACE TABLE dump AS SELECT '
                              + ', '.join(_selected(column, form) for column in columns)
                              + f' FROM {_table(path, form, columns, "gzip" if gzipped else "none")}')
    except duckdb.InvalidInputException:
      return False
    return True

  def _load_repaired(self, path: pathlib.Path, columns: Sequence[str]) -> None:
    """Makes the table `dump` of lines that Python has written."""
    types = {column: _TYPES[column] if column in ('user_id', 'item_id', 'time') else 'JSON' for column in columns}
    selected = [f'{_JSON[column].format(column)} AS {column}' if column in ('rating', 'verified') else column
                for column in columns]
    self.connection.execute(f'CREATE OR REPLACE TABLE dump AS SELECT {", ".join(selected)} FROM '
                            f'{_read_json(path, types, "none", json_lines.MAX_LINE_BYTES)}')

  def _count_good(self, columns: Sequence[str]) -> int:
    """How many lines the table `dump` has, if all have ids and a time that DuckDB reads as Python does; else -1."""
    needed = [f'{column} IS NOT NULL' for column in columns if column in (*dump_formats.IDS, 'time')]
    n_lines, n_good = self.connection.execute(
        f'SELECT count(*), count(*) FILTER ({" AND ".join(needed)}) FROM dump').fetchone()
    return n_good if n_good == n_lines else -1

  def _time_unit(self, path: pathlib.Path) -> str:
    """The table `dump`'s time in seconds, as SQL; its unit is told by all of a file's times. UserError: a mixture."""
    most, short, long = self.connection.execute(f"""
        SELECT max(time), min(time) FILTER (time <> 0 AND time < {MILLISECONDS}), min(time) FILTER (time >= {MILLISECONDS})
        FROM dump""").fetchone()
    if long is None:
      return 'time'
    if most >= _MICROSECONDS:
      raise UserError(f'{path}: holds the time {most}, which is in neither seconds nor milliseconds; convert its times to '
                      'seconds.')
    if short is not None:
      raise UserError(f'{path}: holds times in milliseconds, such as {long}, and in seconds, such as {short}; convert its '
                      'times to seconds.')
    self.sources[-1]['time'] = 'milliseconds'
    return 'time // 1000'


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


def _table(path: pathlib.Path, form: dump_formats.Format, columns: Sequence[str], compression: str) -> str:
  """What reads a file, as SQL: JSON lines or a CSV without quotes."""
  if not form.places:
    return _read_json(path, dict.fromkeys((form.fields[column] for column in columns), 'JSON'), compression)
  names = ', '.join(f"'{column or f'unread {place}'}': 'VARCHAR'" for place, column in enumerate(form.places))
  return (f"read_csv('{_quoted(path)}', columns={{{names}}}, auto_detect=false, delim=',', quote='', escape='', "
          f"header={str(form.header).lower()}, compression='{compression}')")


def _read_json(path: pathlib.Path, types: Mapping[str, str], compression: str, longest: int = _USUAL_LINE_BYTES) -> str:
  columns = ', '.join(f"'{name}': '{kind}'" for name, kind in types.items())
  return (f"read_json('{_quoted(path)}', format='newline_delimited', columns={{{columns}}}, compression='{compression}', "
          f'maximum_object_size={longest})')


def _quoted(path: pathlib.Path) -> str:
  return str(path).replace("'", "''")
