"""Tables as people have them, read into DuckDB: CSV and TSV (gzipped or not), JSON lines, Parquet, MovieLens, RecBole.

DuckDB reads strictly, and out of core. A file of text in which it finds anything unusual is gone through in Python line by
line, which names the bad lines or, where they are tolerated, leaves them out.
"""

import csv
import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import duckdb

from calrec_jax import storage
from calrec_jax.data import json_lines, layouts
from calrec_jax.errors import UserError

MAX_LINE_BYTES = 2_000_000  # DuckDB's own
_HEAD_BYTES = 1 << 20
_SAMPLE_LINES = 10_000  # of JSON, which name the columns
_FOREIGN = ((b'PK\x03\x04', 'a zip archive; unpack it'), (b'\xff\xfe', 'UTF-16; save it as UTF-8'),
            (b'\xfe\xff', 'UTF-16; save it as UTF-8'), (b'PAR1', 'Parquet inside gzip; unpack it'))
_REFUSALS = (duckdb.InvalidInputException, duckdb.BinderException, duckdb.ConversionException)


@dataclasses.dataclass(frozen=True)
class Table:
  """A table in a file.

  Attributes:
    source: the file; `lines` counts a Parquet file's rows.
    columns: their names.
    layout: of a table of text; None of Parquet and JSON lines.
    parquet: whether it is Parquet.
  """

  source: json_lines.Source
  columns: tuple[str, ...]
  layout: layouts.Layout | None = None
  parquet: bool = False

  @property
  def path(self) -> pathlib.Path:
    return self.source.path


def inspect(path: str | os.PathLike, *, progress: bool = True) -> Table:
  """Tells what a file is, and reads its columns' names.

  Raises:
    UserError: the file is missing, a folder, damaged, empty, or nothing that can be read as a table.
  """
  path = storage.local(path)
  parquet = _is_parquet(path)
  source = json_lines.inspect(path, progress=progress)
  columns, layout = _recognise(path, parquet, source.gzipped)
  if parquet:
    count = duckdb.execute(f'SELECT count(*) FROM read_parquet({_literal(path)})').fetchone()[0]
    return Table(dataclasses.replace(source, lines=count), columns, parquet=True)
  if not source.lines:
    raise UserError(f'{path}: is empty.')
  return Table(source, columns, layout)


def column_names(path: str | os.PathLike) -> tuple[str, ...]:
  """The names of a table's columns, for which no more is read than is needed. Raises UserError as `inspect` does."""
  path = storage.local(path)
  return _recognise(path, _is_parquet(path), json_lines.is_gzipped(path))[0]


def _is_parquet(path: pathlib.Path) -> bool:
  """Whether a file is Parquet. Raises UserError: its name alone says so, or there is no such file."""
  with json_lines.file_at(path).open('rb') as file:
    parquet = file.read(4) == b'PAR1'
  if path.suffix == '.parquet' and not parquet:
    raise UserError(f'{path}: is no Parquet file, although its name says so; write it anew, or name it for what it is.')
  return parquet


def _recognise(path: pathlib.Path, parquet: bool, gzipped: bool) -> tuple[tuple[str, ...], layouts.Layout | None]:
  """The names of a table's columns, and the layout of a table of text. Raises UserError."""
  if parquet:
    try:
      return tuple(row[0] for row in duckdb.execute(f'DESCRIBE FROM read_parquet({_literal(path)})').fetchall()), None
    except duckdb.Error as error:
      raise UserError(f'{path}: not a Parquet file that can be read ({str(error).splitlines()[0]}); write it anew.') from error
  with gzip.open(path) if gzipped else path.open('rb') as file:
    head = file.read(_HEAD_BYTES)
  if foreign := next((what for magic, what in _FOREIGN if head.startswith(magic)), None):
    raise UserError(f'{path}: is {foreign}.')
  text = head.decode('utf-8-sig', errors='replace').lstrip('\r\n')
  if text.lstrip().startswith('['):
    raise UserError(f'{path}: is one JSON list; write one object a line.')
  if text.lstrip().startswith('{'):
    return _keys(path), None
  if '\0' in re.split(r'[\r\n]', text, maxsplit=1)[0]:
    raise UserError(f'{path}: is no text in UTF-8 (its first line holds zero bytes); save it as UTF-8, if it is text.')
  layout = layouts.recognise(text, tabs=path.name.removesuffix('.gz').endswith(('.tsv', '.tab')))
  return layout.columns + tuple(layout.flags), layout


def load(connection: duckdb.DuckDBPyConnection, table: Table, columns: Sequence[tuple[str, str]], into: str, *,
         bad: json_lines.BadLines, work: pathlib.Path) -> None:
  """Appends some columns of a table, in the order of its rows, to a table of the connection.

  Args:
    connection: with the table `into`, whose columns are as many, VARCHAR or JSON.
    table: from `inspect`.
    columns: for each column of `into` in its order (name of the table's column, what is wanted): `id`, the text of an id
      (NULL unless it is a text that is not empty, or a whole number), `text`, or `json`, the value as JSON.
    into: the name of the connection's table.
    bad: what takes lines that cannot be read.
    work: a folder for files in between.

  Raises:
    UserError: a column of ids has a type that ids do not have; more bad lines than tolerated.
  """
  link = work / f'table-{len(os.listdir(work))}'
  link.symlink_to(table.path.absolute())  # a name that is no pattern for DuckDB
  try:
    try:
      connection.execute(f'INSERT INTO {into} {_select(connection, table, columns, link)}')
    except _REFUSALS:
      if table.parquet:
        raise
      repaired = work / f'{link.name}-repaired'
      if table.layout is None:
        plain = _repair_json(table, [column for column, _ in columns], repaired, bad)
        columns = [(name, wanted) for name, (_, wanted) in zip(plain.columns, columns, strict=True)]
      else:
        plain = _repair_text(table, repaired, bad)
      connection.execute(f'INSERT INTO {into} {_select(connection, plain, columns, repaired)}')
  except _REFUSALS as error:
    first_line = str(error).splitlines()[0].replace(f'"{link}"', table.path.name)
    raise UserError(f'{table.path}: cannot be read ({first_line}); write it anew.') from error


def _keys(path: pathlib.Path) -> tuple[str, ...]:
  """The keys of the first objects of a file of JSON lines. Raises UserError if there is no object among the first lines."""
  keys: dict[str, None] = {}
  fault, any_object = '', False
  for number, line in itertools.islice(json_lines.lines(path, progress=False), _SAMPLE_LINES):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:  # named when the whole file is read, if others are good
      fault = fault or f'line {number}: not JSON ({str(error).splitlines()[0]})'
      continue
    if isinstance(row, dict):
      any_object = True
      keys.update(dict.fromkeys(row))
  if fault and not any_object:
    raise UserError(f'{path}: {fault}, and no line is an object; write one object a line.')
  return tuple(keys)


def _select(connection: duckdb.DuckDBPyConnection, table: Table, columns: Sequence[tuple[str, str]], path: pathlib.Path) -> str:
  """SQL: the wanted columns of the file at `path`."""
  compression = f"compression='{'gzip' if table.source.gzipped else 'none'}'"
  if table.parquet:
    scan = f'read_parquet({_literal(path)})'
    types = {row[0]: row[1] for row in connection.execute(f'DESCRIBE FROM {scan}').fetchall()}
    values = [_of_parquet(_name(column), types[column], wanted, f'{table.path}: column {column!r}')
              for column, wanted in columns]
  elif table.layout is None:
    spec = ', '.join(f"{_literal(column)}: 'JSON'" for column, _ in columns)
    scan = f"read_json({_literal(path)}, format='newline_delimited', columns={{{spec}}}, {compression})"
    values = [_of_json(_name(column), wanted) for column, wanted in columns]
  else:
    layout = table.layout
    spec = ', '.join(f"'c{number}': 'VARCHAR'" for number in range(len(layout.columns)))
    scan = f"""read_csv({_literal(path)}, auto_detect=false, columns={{{spec}}}, header={layout.header},
        delim='{layout.delimiter}', quote='{layout.quote}', escape='{layout.quote}', {compression},
        max_line_size={MAX_LINE_BYTES}, encoding='{_encoding(table)}')"""
    values = [_of_text(layout, column, wanted) for column, wanted in columns]
  return f'SELECT {", ".join(values)} FROM {scan}'


def _of_text(layout: layouts.Layout, column: str, wanted: str) -> str:
  if column in layout.flags:
    names = layout.flags[column]
    flags = ', '.join(f"CASE WHEN c{layout.columns.index(name)} = '1' THEN {_literal(name)} END" for name in names)
    value = f"concat_ws('{layout.lists[column]}', {flags})"
  else:
    value = f'c{layout.columns.index(column)}'
  return {'id': _checked(value), 'text': value, 'json': f'to_json({value})'}[wanted]


def _of_json(column: str, wanted: str) -> str:
  if wanted == 'json':
    return column
  text = f"({column}->>'$')"
  return text if wanted == 'text' else \
    f"CASE WHEN json_type({column}) IN ('VARCHAR', 'BIGINT', 'UBIGINT') THEN {_checked(text)} END"


def _of_parquet(column: str, kind: str, wanted: str, where: str) -> str:
  if wanted == 'json':
    return f'to_json({column})'
  if wanted == 'id' and not re.match(r'(VARCHAR|U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|ENUM|UUID)', kind) or kind.endswith(']'):
    expected = 'ids are texts or whole numbers; write it as one of these' if wanted == 'id' else 'one value is expected'
    raise UserError(f'{where} is {kind}, where {expected}.')
  text = f'CAST({column} AS VARCHAR)'
  return _checked(text) if wanted == 'id' else text


def _checked(text: str) -> str:
  """SQL: an id, or NULL."""
  return f"CASE WHEN {text} <> '' AND NOT contains({text}, chr(0)) THEN {text} END"


def _literal(text: str | os.PathLike) -> str:
  return "'" + os.fspath(text).replace("'", "''") + "'"


def _name(column: str) -> str:
  return '"' + column.replace('"', '""') + '"'


def _encoding(table: Table) -> str:
  """MovieLens' files have names of films in Latin-1, those of 2009 in UTF-8."""
  if not table.layout.latin_1:
    return 'utf-8'
  try:
    for _, line in json_lines.lines(table.path, progress=False):
      line.decode()
  except UnicodeDecodeError:
    return 'latin-1'
  return 'utf-8'


def _repair_json(table: Table, columns: list[str], repaired: pathlib.Path, bad: json_lines.BadLines) -> Table:
  """Writes the good lines anew, cut down to some columns; returns the table that `repaired` then is.

  Raises UserError as `bad` does.
  """
  names = [f'c{number}' for number in range(len(columns))]
  with repaired.open('wb') as file:
    for number, row in json_lines.objects(table.path, bad):
      try:
        line = json.dumps(dict(zip(names, map(row.get, columns), strict=True)), ensure_ascii=False).encode()
      except UnicodeEncodeError:
        bad.add(number, 'half of a surrogate pair, which is no text')
      else:
        file.write(line + b'\n')
  return Table(dataclasses.replace(table.source, gzipped=False), tuple(names))


def _repair_text(table: Table, repaired: pathlib.Path, bad: json_lines.BadLines) -> Table:
  """Writes the good rows anew, plainly; returns the table that `repaired` then is. Raises UserError as `bad` does."""
  n_columns = len(table.layout.columns)
  with repaired.open('w', encoding='utf-8', newline='') as file:
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator='\n')
    for number, row in _text_rows(table, bad):
      if len(row) != n_columns:
        bad.add(number, f'{len(row)} fields, where {n_columns} are expected')
      elif any('\ud800' <= letter <= '\udfff' for field in row for letter in field):
        bad.add(number, 'not UTF-8')
      else:
        writer.writerow(row)
  plain = dataclasses.replace(table.layout, delimiter=',', quote='"', header=False, latin_1=False)
  return Table(dataclasses.replace(table.source, gzipped=False), table.columns, plain)


def _text_rows(table: Table, bad: json_lines.BadLines) -> Iterator[tuple[int, list[str]]]:
  """(number of its last line from 1, fields) of each row; bytes that are no UTF-8 become halves of surrogate pairs."""
  layout = table.layout
  encoding = 'latin-1' if _encoding(table) == 'latin-1' else 'utf-8-sig'
  csv.field_size_limit(MAX_LINE_BYTES)
  opened = gzip.open if table.source.gzipped else open
  with opened(table.path, 'rt', encoding=encoding, errors='surrogateescape', newline='') as file:
    lines = _short_lines(file, table.path)
    if layout.quote:
      reader = csv.reader(lines, delimiter=layout.delimiter, strict=True)
    else:
      reader = (line.rstrip('\r\n').split(layout.delimiter) for line in lines)
    header = layout.header
    for number in itertools.count(1):
      try:
        row = next(reader)
      except StopIteration:
        return
      except csv.Error as error:
        bad.add(reader.line_num, f'is not {layout.name} ({error})')
        continue
      if not any(field.strip() for field in row):
        continue
      if not header:
        yield (reader.line_num if layout.quote else number), row
      header = False


def _short_lines(file: Iterator[str], path: pathlib.Path) -> Iterator[str]:
  """Lines, as long as they are no longer than DuckDB takes them."""
  for number in itertools.count(1):
    line = file.readline(MAX_LINE_BYTES)
    if not line:
      return
    if len(line) == MAX_LINE_BYTES:
      raise UserError(f'{path}: line {number}: is longer than {MAX_LINE_BYTES:,} characters; is it the file that you mean?')
    yield line
