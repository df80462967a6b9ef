"""From a table of events to histories, in SQL: the k-core, repeats, a count of what each step dropped, and the arrays.

The tables are those of a DuckDB connection: users(id, code) and items(id, code), where a code's order is its id's;
events(user, item, time, line) with codes; histories(user, item, time, rank). Where times are finer than the column `time`, the
rest stands in `line`, above the line's number, so that (time, line) orders by both.
"""

from collections.abc import Iterator

import duckdb
import numpy as np

from calrec_jax.data import time_order
from calrec_jax.errors import UserError

_BLOCK_ROWS = 1 << 25  # of the events, in memory at a time: 270 MB
FRACTION_BITS = 40  # of a line's number, below the rest of its time
EVENT_ORDERS = {'dump': 'time, line', 'hashed': f'time, line >> {FRACTION_BITS}, tie, line'}
DEDUP = {'consecutive': 'consecutive ones dropped', 'none': 'kept', 'first': 'all but the first dropped'}  # as it is told
REPEATS = {  # what is computed of an event, and which ones stay
    'consecutive': (', lag(item) OVER history AS previous', 'previous IS DISTINCT FROM item'),
    'none': ('', 'true'),
    'first': (', row_number() OVER (PARTITION BY user, item ORDER BY {order}) AS occurrence', 'occurrence = 1')}


def number_ids(connection: duckdb.DuckDBPyConnection, table: str, *, user: str, item: str) -> None:
  """Makes users(id, code) and items(id, code) of the ids in two columns of a table."""
  for ids, column in (('users', user), ('items', item)):
    connection.execute(f"""
        CREATE TABLE {ids} AS SELECT {column} AS id, (row_number() OVER (ORDER BY {column}) - 1)::INTEGER AS code
        FROM (SELECT DISTINCT {column} FROM {table})""")


class Steps:
  """Counts what each step left and dropped.

  `rows` is what dataset.json holds of it.
  """

  def __init__(self, connection: duckdb.DuckDBPyConnection):
    self._connection = connection
    self.rows: list[dict] = []

  def count(self, step: str, table: str, cure: str) -> None:
    """Counts the rows of a table after a step. Raises UserError, with the step and a cure, when nothing is left."""
    events, users, items = self._connection.execute(
        f'SELECT count(*), count(DISTINCT user), count(DISTINCT item) FROM {table}').fetchone()
    before = self.rows[-1]['events'] if self.rows else events
    if not events:
      raise UserError(f'Nothing is left: step "{step}" dropped the last {before:,} events; {cure}.')
    self.rows.append({'step': step, 'dropped': before - events, 'events': events, 'users': users, 'items': items})


def k_core(connection: duckdb.DuckDBPyConnection, min_count: int) -> None:
  """Drops users and items with fewer than `min_count` events from the table events, until all have as many.

  The largest such set is unique, so the order of the droppings does not matter. Users and items are counted in memory; more
  than a block of events is read again for each round. Twenty rounds are the rule, and in SQL each would write the table anew.
  """
  kept = {column: np.ones(_n_codes(connection, f'{column}s'), bool) for column in ('user', 'item')}
  counts = {column: np.zeros(len(codes), np.int64) for column, codes in kept.items()}
  [[n_rows]] = connection.execute('SELECT coalesce(max(rowid) + 1, 0) FROM events').fetchall()
  held = list(_blocks(connection, n_rows)) if n_rows <= _BLOCK_ROWS else None
  for block in held or _blocks(connection, n_rows):
    for column, count in counts.items():
      count += np.bincount(block[column], minlength=len(count))
  while True:
    lost = {column: kept[column] & (count < min_count) for column, count in counts.items()}
    if not any(codes.any() for codes in lost.values()):
      break
    for column, codes in lost.items():
      kept[column] &= ~codes
    for number, block in enumerate(held or _blocks(connection, n_rows)):
      # An event that went in an earlier round may be among them: what it is taken off again, a user and an item, is lost.
      gone = np.flatnonzero(lost['user'][block['user']] | lost['item'][block['item']])
      for column, count in counts.items():
        count -= np.bincount(block[column][gone], minlength=len(count))
      if held and len(gone) > len(block['user']) // 8:
        stay = kept['user'][block['user']] & kept['item'][block['item']]
        held[number] = {column: codes[stay] for column, codes in block.items()}
  conditions = []
  for column, codes in kept.items():
    connection.register(f'kept_{column}s', {'code': np.flatnonzero(codes)})
    conditions.append(f'{column} IN (SELECT code FROM kept_{column}s)')
  connection.execute(f'CREATE OR REPLACE TABLE events AS SELECT * FROM events WHERE {" AND ".join(conditions)}')
  for column in kept:
    connection.unregister(f'kept_{column}s')


def _n_codes(connection: duckdb.DuckDBPyConnection, table: str) -> int:
  return connection.execute(f'SELECT coalesce(max(code) + 1, 0) FROM {table}').fetchone()[0]


def _blocks(connection: duckdb.DuckDBPyConnection, n_rows: int) -> Iterator[dict[str, np.ndarray]]:
  """The codes of the table events, 'user' and 'item', so many rows at a time."""
  for begin in range(0, n_rows, _BLOCK_ROWS):
    yield connection.execute(f'SELECT user, item FROM events WHERE rowid >= {begin} AND rowid < {begin + _BLOCK_ROWS}'
                             ).fetchnumpy()


def frequent(connection: duckdb.DuckDBPyConnection, min_count: int) -> None:
  """Drops users and items that have fewer than `min_count` events in the table events before any is dropped."""
  connection.execute(f"""
      CREATE OR REPLACE TABLE events AS SELECT * FROM events
      WHERE user IN (SELECT user FROM events GROUP BY user HAVING count(*) >= {int(min_count)})
        AND item IN (SELECT item FROM events GROUP BY item HAVING count(*) >= {int(min_count)})""")


def drop_repeats(connection: duckdb.DuckDBPyConnection, ties: str, dedup: str = 'consecutive') -> None:
  """Makes histories(user, item, time, rank): a user's events in order, without repeats.

  Repeats are, by `dedup`: `consecutive`, an event of the same item as the one before; `first`, all but the first event of an
  item; `none`, nothing.
  """
  events = 'events' if ties == 'dump' else f"""(
      SELECT events.*, {time_order.SQL_TIE_HASH.format(user='users.id', item='items.id')} AS tie
      FROM events JOIN users ON user = users.code JOIN items ON item = items.code)"""
  columns, kept = REPEATS[dedup]
  connection.execute(f"""
      CREATE TABLE histories AS SELECT user, item, time, rank FROM (
        SELECT *, row_number() OVER history AS rank{columns.format(order=EVENT_ORDERS[ties])}
        FROM {events} WINDOW history AS (PARTITION BY user ORDER BY {EVENT_ORDERS[ties]}))
      WHERE {kept}""")


def drop_short(connection: duckdb.DuckDBPyConnection, min_length: int) -> None:
  """Drops histories of fewer than `min_length` events."""
  connection.execute(f"""
      DELETE FROM histories
      WHERE user IN (SELECT user FROM histories GROUP BY user HAVING count(*) < {int(min_length)})""")


def similar_ids(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
  """How many users, and items, of the histories have an id that is another one's but for case and blanks."""
  counts = {}
  for table, column in (('users', 'user'), ('items', 'item')):
    [[counts[table]]] = connection.execute(fr"""
        SELECT coalesce(CAST(sum(n) AS BIGINT), 0) FROM (
          SELECT count(*) AS n FROM {table} WHERE code IN (SELECT {column} FROM histories)
          GROUP BY regexp_replace(lower(id), '\s', '', 'g') HAVING count(*) > 1)""").fetchall()
  return counts


def arrays(connection: duckdb.DuckDBPyConnection) -> dict:
  """The table histories as ids and arrays (see `histories.Histories`), users and items by id."""
  columns = connection.execute('SELECT user, item, time FROM histories ORDER BY user, rank').fetchnumpy()
  counts = np.bincount(columns['user'])
  n_events = np.bincount(columns['item'])
  places = np.cumsum(n_events > 0) - 1  # of codes, among those of items with events
  ids = {}
  for table, column in (('users', 'user'), ('items', 'item')):
    ids[table] = [row[0] for row in connection.execute(
        f'SELECT id FROM {table} WHERE code IN (SELECT {column} FROM histories) ORDER BY code').fetchall()]
  return {
      'user_ids': ids['users'],
      'item_ids': ids['items'],
      'offsets': np.concatenate([[0], np.cumsum(counts[counts > 0])]).astype(np.int64),
      'events': places[columns['item']].astype(np.int32),
      'timestamps': np.asarray(columns['time'], np.int64),
  }
