"""Formats of Amazon's dumps, told by what a file holds; each line becomes a row of columns that have one name everywhere.

  Amazon 2014  reviews   JSON: reviewerID, asin, unixReviewTime (seconds), overall
               metadata  Python literals in single quotes, or JSON: asin, title, categories (a list of paths), brand, price
               ratings   CSV without a header: user, item, rating, seconds
  Amazon 2018  reviews   as 2014, and verified
               metadata  JSON: asin, title, category (a list), brand, price
               ratings   CSV without a header: item, user, rating, seconds
  Amazon 2023  reviews   JSON: user_id, parent_asin, timestamp (milliseconds), rating, verified_purchase
               metadata  JSON: parent_asin, title, categories (a list), store, price
               ratings   CSV with a header: user_id, parent_asin, rating, timestamp (milliseconds)

Which of the first two columns of a CSV without a header holds the items is told by the shape of their ids, or by the user.
"""

import ast
import collections
import csv
import dataclasses
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError

IDS = ('user_id', 'item_id')
REVIEW_COLUMNS = ('user_id', 'item_id', 'time', 'rating', 'verified')
META_COLUMNS = ('item_id', 'title', 'category', 'brand', 'price')
_SAMPLE_LINES, _SAMPLE_BYTES = 1000, 1 << 20  # of a file's beginning, by which its format is told
_ASIN = re.compile(r'B[0-9A-Z]{9}|[0-9]{9}[0-9X]')  # a product's id; a book's is its ISBN
_SURE = 0.9  # of the sampled lines
_WHOLE = re.compile(r'-?[0-9]{1,19}')
_NUMBER = re.compile(r'[0-9]+(\.[0-9]+)?')


@dataclasses.dataclass(frozen=True)
class Format:
  """How a dump is written.

  Attributes:
    name: what people call it.
    fields: column -> its name in the file, for all columns that the file has.
    places: of a CSV the column at each place, '' for one that is not read; () is JSON.
    header: whether a CSV's first line names its columns.
    loose: whether the file is known to hold lines that are no JSON, but Python literals.
  """

  name: str
  fields: Mapping[str, str]
  places: tuple[str, ...] = ()
  header: bool = False
  loose: bool = False


def _reviews(name: str, *fields: str) -> Format:
  return Format(name, dict(zip(REVIEW_COLUMNS, fields, strict=True)))


def _meta(name: str, *fields: str) -> Format:
  return Format(name, dict(zip(META_COLUMNS, fields, strict=True)))


USUAL = 'Amazon 2018'
_REVIEWS = (_reviews(USUAL, 'reviewerID', 'asin', 'unixReviewTime', 'overall', 'verified'),
            _reviews('Amazon 2023', 'user_id', 'parent_asin', 'timestamp', 'rating', 'verified_purchase'),
            _reviews('Amazon 2023', 'user_id', 'asin', 'timestamp', 'rating', 'verified_purchase'),
            _reviews('Amazon 2023', 'user_id', 'parent_asin', 'sort_timestamp', 'rating', 'verified_purchase'))
_META = (_meta(USUAL, 'asin', 'title', 'category', 'brand', 'price'),
         _meta('Amazon 2014', 'asin', 'title', 'categories', 'brand', 'price'),
         _meta('Amazon 2023', 'parent_asin', 'title', 'categories', 'store', 'price'))
_HEADERS = {'user_id': ('user_id', 'reviewerID', 'user'), 'item_id': ('parent_asin', 'asin', 'item_id', 'item'),
            'time': ('timestamp', 'unixReviewTime', 'time'), 'rating': ('rating', 'overall')}
_CSV_COLUMNS = {'user': 'user_id', 'item': 'item_id', 'rating': 'rating', 'time': 'time', '-': ''}


def csv_places(columns: str | None) -> tuple[str, ...]:
  """'item,user,rating,time' -> ('item_id', 'user_id', 'rating', 'time'); None -> (). Raises UserError for other words."""
  if columns is None:
    return ()
  names = [name.strip() for name in columns.split(',')]
  places = tuple(_CSV_COLUMNS.get(name, '?') for name in names)
  if '?' in places or any(places.count(column) != 1 for column in ('user_id', 'item_id', 'time')) or places.count('rating') > 1:
    raise UserError(f'--csv_columns {columns}: name the columns in their order, such as item,user,rating,time, or - for one '
                    'that is not read; user, item and time are needed.')
  return places


def of_reviews(path: pathlib.Path, places: Sequence[str] = ()) -> Format:
  """The format of a review file, or one of ratings only.

  Args:
    path: the file.
    places: the columns of a CSV, where the user says so; see `csv_places`.

  Raises:
    UserError: JSON of other fields, a CSV whose columns cannot be told, or a file that cannot be read.
  """
  sample = _sample(path)
  if sample and not sample[0].lstrip().startswith((b'{', b'[')) and sample[0].count(b',') >= 2:
    return _of_csv(path, sample, tuple(places))
  rows = _sample_rows(sample)
  fitting = [sum(all(form.fields[column] in row for column in REVIEW_COLUMNS[:3]) for row in rows) for form in _REVIEWS]
  best = _REVIEWS[fitting.index(max(fitting))]
  if rows and not any(fitting):
    fields = ', '.join(f'"{field}"' for field in list(rows[0])[:8])
    raise UserError(f'{path}: its lines are no reviews that are known: they have {fields[:200]}, where those of Amazon 2014 '
                    'and 2018 have "reviewerID", "asin", "unixReviewTime", of 2023 "user_id", "parent_asin", "timestamp".')
  if best.name == USUAL and any('helpful' in row for row in rows) and not any('verified' in row for row in rows):
    best = dataclasses.replace(best, name='Amazon 2014')
  return dataclasses.replace(best, loose=_is_loose(sample))


def of_meta(path: pathlib.Path) -> Format:
  """The format of a metadata file. Raises UserError if it cannot be read."""
  sample = _sample(path)
  seen = collections.Counter(field for row in _sample_rows(sample) for field in row)
  usual, old, new = _META
  best = new if seen['parent_asin'] > seen['asin'] else old if seen['categories'] > seen['category'] else usual
  return dataclasses.replace(best, loose=_is_loose(sample))


def rows(path: pathlib.Path, form: Format, columns: Sequence[str], bad: json_lines.BadLines, *, progress: bool = True
         ) -> Iterator[dict]:
  """Yields the good lines of a dump as {column: value}; the others go to `bad`.

  Ids are texts, times whole numbers; a rating, a verdict and the attributes of an item are whatever the line has, or None.
  """
  numbered = (_csv_rows(path, form, bad, progress=progress) if form.places else
              json_lines.objects(path, bad, read=read_object, progress=progress))
  for number, found in numbered:
    row = {column: found.get(form.fields[column]) if column in form.fields else None for column in columns}
    fault = _fault(row, form)
    if fault:
      bad.add(number, fault)
    else:
      yield row


def read_object(line: bytes) -> object:
  """The value of a line of JSON or, where it is none and opens with {', of a Python literal (which runs nothing).

  Raises ValueError, or RecursionError.
  """
  try:
    return json.loads(line)
  except ValueError as error:
    if not line.lstrip().startswith(b"{'"):
      raise
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of escapes that mean nothing
        return ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, TypeError, MemoryError) as literal:
      raise ValueError(f'nor a Python literal: {str(literal) or error}') from None


def write_row(row: Mapping[str, object]) -> bytes:
  """A row as a line of JSON that DuckDB reads: halves of surrogate pairs become ?, what JSON has no name for is null."""
  try:
    text = json.dumps(row, ensure_ascii=False, skipkeys=True, default=lambda value: None)
  except RecursionError:
    text = json.dumps({column: value if isinstance(value, (str, int)) else None for column, value in row.items()})
  return text.encode(errors='replace') + b'\n'


def _sample(path: pathlib.Path) -> list[bytes]:
  """The first lines of a file."""
  lines: list[bytes] = []
  n_bytes = 0
  for _, line in json_lines.lines(path, progress=False):
    lines.append(line)
    n_bytes += len(line)
    if len(lines) == _SAMPLE_LINES or n_bytes > _SAMPLE_BYTES:
      break
  return lines


def _sample_rows(sample: Sequence[bytes]) -> list[dict]:
  """The objects of the first hundred lines, empty ones left out."""
  found = []
  for line in sample[:100]:
    try:
      row = read_object(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(row, dict) and row:
      found.append(row)
  return found


def _is_loose(sample: Sequence[bytes]) -> bool:
  return any(line.lstrip().startswith(b"{'") for line in sample)


def _of_csv(path: pathlib.Path, sample: Sequence[bytes], places: tuple[str, ...]) -> Format:
  """The format of a CSV: its header says it, or the user, or the shape of the ids."""
  found = [cells for line in sample if (cells := _cells(line))]
  if not found:
    raise UserError(f'{path}: is neither JSON lines nor a CSV; give a dump of reviews, or of ratings.')
  first = found[0]
  named = {column: name for column, names in _HEADERS.items() for name in names[::-1] if name in first}
  header = {'user_id', 'item_id', 'time'} <= named.keys()
  if header and (twice := [name for name in named.values() if first.count(name) > 1]):
    raise UserError(f'{path}: has {first.count(twice[0])} columns {twice[0]!r}; give them different names.')
  if header and not places:
    columns = {name: column for column, name in named.items()}
    new = {'user_id', 'parent_asin', 'rating', 'timestamp'} <= set(first)
    return Format('Amazon 2023 ratings' if new else 'ratings', named, tuple(columns.get(cell, '') for cell in first),
                  header=True)
  year = ''
  if not places:
    if len(first) != 4:
      raise UserError(f'{path}: line 1 has {len(first)} columns, where a CSV of ratings has four, or a header such as '
                      'user_id,parent_asin,rating,timestamp; name its columns with --csv_columns.')
    places, year = _told_by_shape(path, [cells for cells in found if len(cells) == 4])
  time = places.index('time')
  header = header or (len(first) > time and bool(re.fullmatch('[A-Za-z_ ]+', first[time])))
  names = {column: name for name, column in _CSV_COLUMNS.items() if column in places and column}
  return Format(f'Amazon {year} ratings' if year else 'ratings', names, places, header=header)


def _told_by_shape(path: pathlib.Path, lines: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], str]:
  """The columns of a CSV without a header, and the year whose dumps are so. Raises UserError if the ids do not tell."""
  shares = [sum(bool(_ASIN.fullmatch(cells[place])) for cells in lines) / len(lines) for place in (0, 1)]
  if shares[0] >= _SURE and shares[1] <= 1 - _SURE:
    return ('item_id', 'user_id', 'rating', 'time'), '2018'
  if shares[1] >= _SURE and shares[0] <= 1 - _SURE:
    return ('user_id', 'item_id', 'rating', 'time'), '2014'
  raise UserError(f'{path}: has no header, and it cannot be told which column holds the items: {shares[0]:.0%} of the first '
                  f'column and {shares[1]:.0%} of the second look like products of Amazon; say it with --csv_columns, such as '
                  'user,item,rating,time.')


def _cells(line: bytes) -> list[str]:
  """The cells of a line of CSV; [] if it is none."""
  try:
    [cells] = csv.reader([line.decode().rstrip('\r\n')], strict=True)
  except (ValueError, csv.Error):
    return []
  return cells


def _csv_rows(path: pathlib.Path, form: Format, bad: json_lines.BadLines, *, progress: bool) -> Iterator[tuple[int, dict]]:
  """(number from 1, {name in the file: value}) of each line of a CSV, its header left out."""
  header = form.header
  for number, line in json_lines.lines(path, progress=progress):
    if header:
      header = False
      continue
    cells = _cells(line)
    if len(cells) != len(form.places):
      bad.add(number, f'{len(cells)} columns, where {len(form.places)} are expected' if cells else 'no CSV')
      continue
    row: dict[str, object] = {form.fields[column]: cell for column, cell in zip(form.places, cells, strict=True) if column}
    for column, pattern, number_of in (('time', _WHOLE, int), ('rating', _NUMBER, float)):
      name = form.fields.get(column)
      if name and pattern.fullmatch(row[name]):
        row[name] = number_of(row[name])
    yield number, row


def _fault(row: Mapping[str, object], form: Format) -> str:
  """What makes a row bad; '' if it is good."""
  for column, value in row.items():
    name = form.fields.get(column)
    if column in IDS and not (isinstance(value, str) and value and not re.search('[\0\ud800-\udfff]', value)):
      return f'"{name}" is missing' if value is None else f'"{name}" is {_shown(value)}, where an id is expected'
    if column == 'time' and not (type(value) is int and abs(value) < 2**63):
      return f'"{name}" is missing' if value is None else f'"{name}" is {_shown(value)}, where whole seconds are expected'
  return ''


def _shown(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:80]}…'


def named(path: str | os.PathLike, form: Format) -> dict[str, str]:
  """What dataset.json says of a file's format: nothing of the usual one, as data sets were made before there were others."""
  return {} if form.name == USUAL and not form.places else {'format': form.name + (', single quotes' if form.loose else '')}
