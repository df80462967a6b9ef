"""Dumps of the Amazon Review Data of 2014, 2018 and 2023 become a histories folder.

The steps, in this order (method: Data):
  1. The events as published: one a line of the review files; a review published twice is two events. Each file's format and
     unit of time are told by its content (`dump_formats`).
  2. Where asked for (`dump_rules`): only events of a span of time, of verified purchases, of a least number of stars.
  3. Iterative k-core: users and items with fewer than `min_count` events go, until none is left to go, or `once`.
  4. A user's events are ordered by (time, line), or (time, hash, line); several files count as one, in the order given.
     Times in milliseconds order events as such, and are kept as whole seconds, rounded down.
  5. Of consecutive events of one user with one item the first stays; or of all of them, or none goes (`dedup`).
  6. Histories shorter than `min_length` go.
  7. Items: those that a history holds, by id. Of an item's lines in the metadata the first with a usable title counts
     (usable: `cleaning.clean_text` leaves something of it), else its first line. No line: all attributes unknown.

DuckDB reads and joins (`dump_tables`), on disk where memory is short. What it makes does not depend on threads or memory.
"""

import contextlib
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import tqdm

from calrec_jax import outputs, storage
from calrec_jax.data import dump_tables, histories, json_lines, time_order
from calrec_jax.data.dump_rules import Rules
from calrec_jax.errors import UserError

_EVENT_ORDERS = {'dump': 'time, line', 'hashed': f'time, line >> {dump_tables.FRACTION_BITS}, tie, line'}
_FILES = {'dataset.json', 'items.jsonl.gz', 'sequences.jsonl.gz'}


def prepare_dumps(reviews: Sequence[str | os.PathLike], meta: Sequence[str | os.PathLike] = (), *, name: str,
                  out: str | os.PathLike, threads: int | None = None, memory_limit: str | None = None,
                  tmp_dir: str | os.PathLike | None = None, progress: bool = True, **rules: object) -> dict:
  """Makes the histories folder `out` from review files and, if there are any, metadata files.

  Where `out` is what these files and rules make, that is logged, and nothing is done.

  Args:
    reviews: reviews, or ratings only, in any of the formats of `dump_formats`, gzipped or not.
    meta: metadata likewise.
    name: of the data set.
    out: the new folder; it appears whole or not at all.
    threads: of DuckDB; None: one for each core. The data set does not depend on it, nor on the next two.
    memory_limit: of DuckDB, such as '2GB'; None: 80 % of the memory. What does not fit is kept on disk.
    tmp_dir: where DuckDB works; None: beside `out`.
    progress: whether to show progress on stderr.
    **rules: `dump_rules.Rules`.

  Returns:
    The description, as in dataset.json; `describe.format_description` prints it.

  Raises:
    UserError: bad input, nothing left, no room, or `out` in use.
  """
  histories.check_name(name)
  chosen = Rules(**rules)
  if not reviews:
    raise UserError('No review file is given; name at least one.')
  settings = _settings(threads, memory_limit)
  if known := _already_made(out, name, [*reviews, *meta], chosen, progress=progress):
    logging.info('%s: already made of these files by these rules; nothing is done.', out)
    return known
  with outputs.new_folder(out) as scratch, _workplace(tmp_dir or scratch) as work:
    bar = tqdm.tqdm(total=len(reviews) + len(meta) + 3, desc=f'preparing {name}', leave=False, delay=1,
                    disable=not progress)
    with bar, _told(work), duckdb.connect(os.path.join(work, 'events.duckdb'), config=settings) as connection:
      connection.execute('SET preserve_insertion_order = true')
      dumps = dump_tables.Dumps(connection, work, chosen, bar)
      dumps.read_reviews(reviews)
      steps = _filter(connection, bar, chosen, n_bad=dumps.n_bad)
      similar = _similar_ids(connection)
      arrays = _arrays(connection)
      bar.update()
      items, metadata = dumps.read_items(meta, arrays['item_ids'])
      data = histories.Histories(name, arrays['user_ids'], arrays['item_ids'], items, arrays['offsets'],
                                 arrays['events'], arrays['timestamps'],
                                 time_order.cutoffs(arrays['timestamps'], name) if chosen.split == 'time' else None)
    return histories.write(scratch, data, {
        'sources': dumps.sources,
        'options': chosen.options(),
        'steps': steps,
        'bad_lines': dumps.n_bad,
        **({'similar_ids': similar} if any(similar.values()) else {}),
        **({'metadata': metadata} if meta else {}),
    })


def _already_made(out: str | os.PathLike, name: str, paths: Sequence[str | os.PathLike], rules: Rules, *, progress: bool
                  ) -> dict | None:
  """The description of the data set in `out`, if these files and rules made it; None if not, or if there is none."""
  if not _FILES <= set(storage.names(out)):
    return None
  found = outputs.read_object(storage.local(out, files=['dataset.json']) / 'dataset.json')
  made = [source.get('sha256') for source in found.get('sources', [])]
  if (found.get('format'), found.get('name'), found.get('options')) != (histories.FORMAT, name, rules.options()):
    return None
  same = len(made) == len(paths) and all(digest == json_lines.digest(storage.local(path), progress=progress)
                                         for digest, path in zip(made, paths, strict=True))
  return found if same else None


def _settings(threads: int | None, memory_limit: str | None) -> dict[str, object]:
  """DuckDB's settings. Raises UserError for values that it would not take."""
  if threads is not None and threads < 1:
    raise UserError(f'--threads {threads}: give at least one.')
  if memory_limit is not None and not re.fullmatch(r'\d+(\.\d+)? ?[KMGT]i?B', memory_limit):
    raise UserError(f'--memory_limit {memory_limit}: write a size such as 2GB or 500MB.')
  return {name: value for name, value in (('threads', threads), ('memory_limit', memory_limit)) if value is not None}


@contextlib.contextmanager
def _workplace(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A new folder inside `folder`, which vanishes at the end."""
  try:
    os.makedirs(folder, exist_ok=True)
    work = tempfile.TemporaryDirectory(prefix='calrec.', dir=folder)
  except OSError as error:
    raise UserError(f'{folder}: nothing can be written there ({error.strerror}); choose another --tmp_dir.') from error
  with work:
    yield pathlib.Path(work.name)


@contextlib.contextmanager
def _told(work: pathlib.Path) -> Iterator[None]:
  """Want of memory or of room on the disk becomes a UserError."""
  try:
    yield
  except duckdb.OutOfMemoryException as error:
    raise UserError(f'DuckDB is out of memory ({_first_line(error)}); give a larger --memory_limit, or fewer --threads.'
                    ) from error
  except duckdb.Error as error:
    if not (isinstance(error, duckdb.IOException) or 'Could not write' in str(error)):
      raise
    raise UserError(f'{work.parent}: DuckDB cannot work there ({_first_line(error)}); make room, or choose another --tmp_dir.'
                    ) from error


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200]


def _filter(connection: duckdb.DuckDBPyConnection, bar: tqdm.tqdm, rules: Rules, *, n_bad: int) -> list[dict]:
  """Filters the table events down to the histories, in the table histories(user, item, time, rank).

  Returns what each step left and dropped. Raises UserError, naming the step, when nothing is left.
  """
  steps: list[dict] = []

  def count(step: str, table: str, cure: str) -> None:
    events, users, items = connection.execute(
        f'SELECT count(*), count(DISTINCT user), count(DISTINCT item) FROM {table}').fetchone()
    before = steps[-1]['events'] if steps else events
    if not events:
      raise UserError(f'Nothing is left: step "{step}" dropped the last {before:,} events; {cure}.')
    steps.append({'step': step, 'dropped': before - events, 'events': events, 'users': users, 'items': items})

  count('read', 'events', f'the review files hold no event ({n_bad} bad lines)')
  for step, condition, cure in _conditions(rules):
    connection.execute(f'DELETE FROM events WHERE NOT coalesce({condition}, false)')
    count(step, 'events', cure)
  if rules.core == 'iterative':
    _k_core(connection, rules.min_count)
    count(f'k-core, at least {rules.min_count} events', 'events', 'give a smaller --min_count, or more reviews')
  else:
    _frequent(connection, rules.min_count)
    count(f'at least {rules.min_count} events, once', 'events', 'give a smaller --min_count, or more reviews')
  bar.update()
  _drop_repeats(connection, rules.ties, rules.dedup)
  count({'consecutive': 'consecutive duplicates', 'first': 'all duplicates', 'none': 'duplicates, which stay'}[rules.dedup],
        'histories', 'a bug')
  connection.execute(f"""
      DELETE FROM histories
      WHERE user IN (SELECT user FROM histories GROUP BY user HAVING count(*) < {int(rules.min_length)})""")
  count(f'histories shorter than {rules.min_length}', 'histories', 'give a smaller --min_length, or more reviews')
  bar.update()
  return steps


def _conditions(rules: Rules) -> Iterator[tuple[str, str, str]]:
  """(step, what its events fulfil as SQL, cure if none does) of each filter of single events that is asked for."""
  if rules.since is not None:
    yield f'since {rules.since} s', f'time >= {rules.since}', 'give an earlier --since'
  if rules.until is not None:
    yield f'until {rules.until} s', f'time < {rules.until}', 'give a later --until'
  if rules.verified_only:
    yield ('verified purchases', 'verified',
           'leave out --verified_only (dumps of 2014 and of ratings do not say which purchases are verified)')
  if rules.min_rating is not None:
    yield f'at least {rules.min_rating:g} stars', f'rating >= {float(rules.min_rating)!r} AND NOT isnan(rating)', (
        'give a smaller --min_rating')


def _k_core(connection: duckdb.DuckDBPyConnection, min_count: int) -> None:
  """Drops users and items with fewer than `min_count` events from the table events, until all have as many.

  The largest such set is unique, so the order of the droppings does not matter.
  """
  before = None
  while before != (before := connection.execute('SELECT count(*) FROM events').fetchone()):
    _frequent(connection, min_count)


def _frequent(connection: duckdb.DuckDBPyConnection, min_count: int) -> None:
  """Drops users and items that have fewer than `min_count` events in the table events before any is dropped."""
  connection.execute(f"""
      CREATE OR REPLACE TABLE events AS SELECT * FROM events
      WHERE user IN (SELECT user FROM events GROUP BY user HAVING count(*) >= {int(min_count)})
        AND item IN (SELECT item FROM events GROUP BY item HAVING count(*) >= {int(min_count)})""")


def _drop_repeats(connection: duckdb.DuckDBPyConnection, ties: str, dedup: str) -> None:
  """Makes histories(user, item, time, rank): a user's events in order, without those that `dedup` drops."""
  order = _EVENT_ORDERS[ties]
  events = 'events' if ties == 'dump' else f"""(
      SELECT events.*, {time_order.SQL_TIE_HASH.format(user='users.id', item='items.id')} AS tie
      FROM events JOIN users ON user = users.code JOIN items ON item = items.code)"""
  stays = {
      'consecutive': 'lag(item) OVER history IS DISTINCT FROM item',
      'first': f'row_number() OVER (PARTITION BY user, item ORDER BY {order}) = 1',
      'none': 'true',
  }[dedup]
  connection.execute(f"""
      CREATE TABLE histories AS SELECT user, item, time, rank FROM (
        SELECT *, row_number() OVER history AS rank, {stays} AS stays
        FROM {events} WINDOW history AS (PARTITION BY user ORDER BY {order}))
      WHERE stays""")


def _similar_ids(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
  """How many users, and items, of the histories have an id that is another one's but for case and blanks."""
  counts = {}
  for table, column in (('users', 'user'), ('items', 'item')):
    [[counts[table]]] = connection.execute(fr"""
        SELECT coalesce(CAST(sum(n) AS BIGINT), 0) FROM (
          SELECT count(*) AS n FROM {table} WHERE code IN (SELECT {column} FROM histories)
          GROUP BY regexp_replace(lower(id), '\s', '', 'g') HAVING count(*) > 1)""").fetchall()
  return counts


def _arrays(connection: duckdb.DuckDBPyConnection) -> dict:
  """The table histories as ids and arrays (see `histories.Histories`), users and items by id."""
  columns = connection.execute('SELECT user, item, time FROM histories ORDER BY user, rank').fetchnumpy()
  counts = np.unique(columns['user'], return_counts=True)[1]
  events = np.unique(columns['item'], return_inverse=True)[1]
  ids = {}
  for table, column in (('users', 'user'), ('items', 'item')):
    ids[table] = [row[0] for row in connection.execute(
        f'SELECT id FROM {table} WHERE code IN (SELECT {column} FROM histories) ORDER BY code').fetchall()]
  return {
      'user_ids': ids['users'],
      'item_ids': ids['items'],
      'offsets': np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
      'events': events.astype(np.int32),
      'timestamps': np.asarray(columns['time'], np.int64),
  }
