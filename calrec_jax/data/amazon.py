"""Dumps of the Amazon Review Data 2018 become a histories folder.

The steps, in this order (method: Data):
  1. The events as published: one a line of the review files; a review published twice is two events.
  2. Iterative k-core: users and items with fewer than `min_count` events go, until none is left to go.
  3. A user's events are ordered by (time, line), or (time, hash, line); several files count as one, in the order given.
  4. Of consecutive events of one user with one item the first stays.
  5. Histories shorter than `min_length` go.
  6. Items: those that a history holds, by id. Of an item's lines in the metadata the first with a usable title counts
     (usable: `cleaning.clean_text` leaves something of it), else its first line. No line: all attributes unknown.

DuckDB reads and joins, on disk where memory is short. It reads strictly; a file in which it finds anything unusual is
gone through in Python line by line, which names the bad lines or, where they are tolerated, leaves them out.
"""

import json
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence

import duckdb
import tqdm

from calrec_jax import outputs, storage
from calrec_jax.data import cleaning, filtering, histories, json_lines, time_order
from calrec_jax.errors import UserError

_REVIEW_FIELDS = ('reviewerID', 'asin', 'unixReviewTime')
_META_FIELDS = ('asin', 'title', 'category', 'brand', 'price')
_IDS = ('reviewerID', 'asin')
_CLEANERS = {'title': cleaning.clean_text, 'category': cleaning.clean_category, 'brand': cleaning.clean_brand,
             'price': cleaning.clean_price}


def prepare_dumps(reviews: Sequence[str | os.PathLike], meta: Sequence[str | os.PathLike] = (), *, name: str,
                  out: str | os.PathLike, min_count: int = 5, min_length: int = 3, max_bad_lines: int = 0,
                  ties: str = 'dump', split: str = 'leave_one_out', progress: bool = True) -> dict:
  """Makes the histories folder `out` from review files and, if there are any, metadata files.

  Args:
    reviews: JSON lines (gzipped or not) with "reviewerID", "asin" and "unixReviewTime" (seconds).
    meta: JSON lines with "asin" and some of "title", "category" (a list, from broad to narrow), "brand", "price".
    name: of the data set.
    out: the new folder; it appears whole or not at all.
    min_count: the k of the k-core, in events.
    min_length: shorter histories are dropped and counted.
    max_bad_lines: lines of each file that may be broken: no JSON object, or one without the fields it must have.
    ties: the order of a user's events of one time: `dump`, that of the lines, as the literature has it; or `hashed`.
    split: `leave_one_out`, or `time`: see `time_order.cutoffs`.
    progress: whether to show progress on stderr.

  Returns:
    The description, as in dataset.json; `describe.format_description` prints it.

  Raises:
    UserError: bad input, nothing left, or `out` in use.
  """
  histories.check_name(name)
  time_order.check_options(ties, split)
  if not reviews:
    raise UserError('No review file is given; name at least one.')
  with outputs.new_folder(out) as scratch, tempfile.TemporaryDirectory(dir=scratch) as work:
    bar = tqdm.tqdm(total=len(reviews) + len(meta) + 3, desc=f'preparing {name}', leave=False, delay=1,
                    disable=not progress)
    with bar, duckdb.connect(os.path.join(work, 'events.duckdb')) as connection:
      connection.execute('SET preserve_insertion_order = true')
      dumps = _Dumps(connection, pathlib.Path(work), max_bad_lines, bar)
      dumps.read_reviews(reviews)
      steps = _filter(connection, bar, min_count=min_count, min_length=min_length, ties=ties, n_bad=dumps.n_bad)
      arrays = filtering.arrays(connection)
      bar.update()
      items, metadata = dumps.read_items(meta, arrays['item_ids'])
      data = histories.Histories(name, arrays['user_ids'], arrays['item_ids'], items, arrays['offsets'],
                                 arrays['events'], arrays['timestamps'],
                                 time_order.cutoffs(arrays['timestamps'], name) if split == 'time' else None)
    return histories.write(scratch, data, {
        'sources': [source.description() for source in dumps.sources],
        'options': {'min_count': min_count, 'min_length': min_length, 'max_bad_lines': max_bad_lines, 'ties': ties,
                    'split': split, 'repeats': 'consecutive ones dropped'},
        'steps': steps,
        'bad_lines': dumps.n_bad,
        **({'metadata': metadata} if meta else {}),
    })


class _Dumps:
  """Reads dumps into DuckDB's tables; keeps their digests and the number of bad lines."""

  def __init__(self, connection: duckdb.DuckDBPyConnection, work: pathlib.Path, max_bad_lines: int, bar: tqdm.tqdm):
    self.connection, self.work, self.max_bad_lines, self.bar = connection, work, max_bad_lines, bar
    self.sources: list[json_lines.Source] = []
    self.n_bad = 0

  def read_reviews(self, paths: Sequence[str | os.PathLike]) -> None:
    """Fills the table events(user, item, time, line) with codes for ids; a code's order is its id's."""
    self.connection.execute('CREATE TABLE lines (user_id VARCHAR, item_id VARCHAR, time BIGINT, line BIGINT)')
    for path in paths:
      self._read(path, _REVIEW_FIELDS, """
          INSERT INTO lines SELECT reviewerID->>'$', asin->>'$', CAST(unixReviewTime AS BIGINT),
            (SELECT count(*) FROM lines) + row_number() OVER () FROM dump""")
    self.connection.execute("""
        CREATE TABLE users AS SELECT user_id AS id, row_number() OVER (ORDER BY user_id) - 1 AS code
          FROM (SELECT DISTINCT user_id FROM lines);
        CREATE TABLE items AS SELECT item_id AS id, row_number() OVER (ORDER BY item_id) - 1 AS code
          FROM (SELECT DISTINCT item_id FROM lines);
        CREATE TABLE events AS SELECT users.code AS user, items.code AS item, time, line
          FROM lines JOIN users ON user_id = users.id JOIN items ON item_id = items.id;
        DROP TABLE lines""")

  def read_items(self, paths: Sequence[str | os.PathLike], item_ids: list[str]) -> tuple[list[dict[str, str]], dict]:
    """The cleaned attributes of `item_ids`, and counts of what the metadata held."""
    self.connection.execute(f"""
        CREATE TABLE meta ({', '.join(f'{field} JSON' for field in _META_FIELDS)}, line BIGINT);
        CREATE TABLE wanted AS SELECT id FROM items WHERE code IN (SELECT item FROM histories)""")
    counts = {'lines': 0, 'repeated_lines': 0, 'items_without': 0}
    for path in paths:
      self._read(path, _META_FIELDS, f"""
          INSERT INTO meta SELECT {', '.join(_META_FIELDS)}, (SELECT coalesce(max(line), 0) FROM meta) + number
          FROM (SELECT *, row_number() OVER () AS number FROM dump) WHERE asin->>'$' IN (SELECT id FROM wanted)""")
      counts['lines'] += self.sources[-1].lines
    items: dict[str, dict[str, str]] = {}
    rows = self.connection.execute(f'SELECT {", ".join(_META_FIELDS)} FROM meta ORDER BY line')
    while row := rows.fetchone():
      asin, *values = [None if value is None else json.loads(value) for value in row]
      counts['repeated_lines'] += asin in items
      if asin not in items or not items[asin]['title']:
        item = {field: clean(value) for (field, clean), value in zip(_CLEANERS.items(), values, strict=True)}
        if asin not in items or item['title']:
          items[asin] = item
    counts['items_without'] = len(item_ids) - len(items)
    return [items.get(item_id) or dict.fromkeys(histories.FIELDS, '') for item_id in item_ids], counts

  def _read(self, path: str | os.PathLike, fields: tuple[str, ...], statement: str) -> None:
    """Runs `statement` on the table `dump` of a file: its good lines, in order, each field of type JSON."""
    path = storage.local(path)
    source = json_lines.inspect(path, progress=not self.bar.disable)
    self.sources.append(source)
    if not self._load(source.path, fields, gzipped=source.gzipped) or self._count_good(fields) != source.lines:
      repaired = self.work / f'repaired-{len(self.sources)}.jsonl'
      self.n_bad += _repair(source.path, fields, repaired, self.max_bad_lines)
      self._load(repaired, fields, gzipped=False, must=True)
    self.connection.execute(statement + '; DROP TABLE dump')
    self.bar.update()

  def _load(self, path: pathlib.Path, fields: tuple[str, ...], *, gzipped: bool, must: bool = False) -> bool:
    """Fills the table `dump`; returns False where DuckDB found a line that it does not take."""
    columns = ', '.join(f"'{field}': 'JSON'" for field in fields)
    name = str(path).replace("'", "''")
    try:
      self.connection.execute(f"""
          CREATE OR REPLACE TABLE dump AS SELECT * FROM read_json('{name}', format='newline_delimited',
            columns={{{columns}}}, compression='{'gzip' if gzipped else 'none'}', maximum_object_size=67108864)""")
    except duckdb.InvalidInputException:
      if must:
        raise
      return False
    return True

  def _count_good(self, fields: tuple[str, ...]) -> int:
    """How many lines of the table `dump` have ids and a time that DuckDB reads as Python does; -1 if some have not."""
    good = []
    for field in fields:
      if field in _IDS:
        good.append(rf'''json_type({field}) = 'VARCHAR' AND NOT regexp_matches({field}, '^""$|\\u0000')''')
      elif field == 'unixReviewTime':
        good.append("json_type(unixReviewTime) IN ('UBIGINT', 'BIGINT')")
        good.append('TRY_CAST(unixReviewTime AS BIGINT) IS NOT NULL')
    n_lines, n_good = self.connection.execute(
        f'SELECT count(*), count(*) FILTER (coalesce({" AND ".join(good)}, false)) FROM dump').fetchone()
    return n_good if n_good == n_lines else -1


def _repair(path: pathlib.Path, fields: tuple[str, ...], repaired: pathlib.Path, max_bad_lines: int) -> int:
  """Writes the good lines of a dump, cut down to `fields`; returns the number of bad ones.

  Raises UserError, which names a line, when there are more than `max_bad_lines`.
  """
  bad = json_lines.BadLines(path, max_bad_lines)
  with repaired.open('wb') as file:
    for number, row in json_lines.objects(path, bad):
      fault = _fault(row, fields)
      if fault:
        bad.add(number, fault)
      else:
        row = {field: row.get(field) for field in fields}
        file.write(json.dumps(row, ensure_ascii=False).encode(errors='replace') + b'\n')
  return bad.count


def _fault(row: dict, fields: tuple[str, ...]) -> str:
  """What makes a line of a dump bad; '' if it is good."""
  for field in fields:
    value = row.get(field)
    if field in _IDS and not (isinstance(value, str) and _is_id(value)):
      return f'"{field}" is missing' if value is None else f'"{field}" is {value!r}, where an id is expected'
    if field == 'unixReviewTime' and not (type(value) is int and abs(value) < 2**63):
      return f'"{field}" is missing' if value is None else f'"{field}" is {value!r}, where whole seconds are expected'
  return ''


def _is_id(value: str) -> bool:
  return bool(value) and not re.search('[\0\ud800-\udfff]', value)


def _filter(connection: duckdb.DuckDBPyConnection, bar: tqdm.tqdm, *, min_count: int, min_length: int, ties: str,
            n_bad: int) -> list[dict]:
  """Filters the table events down to the histories, in the table histories(user, item, time, rank).

  Returns what each step left and dropped. Raises UserError, naming the step, when nothing is left.
  """
  steps = filtering.Steps(connection)
  steps.count('read', 'events', f'the review files hold no event ({n_bad} bad lines)')
  filtering.k_core(connection, min_count)
  steps.count(f'k-core, at least {min_count} events', 'events', 'give a smaller --min_count, or more reviews')
  bar.update()
  filtering.drop_repeats(connection, ties)
  steps.count('consecutive duplicates', 'histories', 'a bug')
  connection.execute(f"""
      DELETE FROM histories
      WHERE user IN (SELECT user FROM histories GROUP BY user HAVING count(*) < {int(min_length)})""")
  steps.count(f'histories shorter than {min_length}', 'histories', 'give a smaller --min_length, or more reviews')
  bar.update()
  return steps.rows
