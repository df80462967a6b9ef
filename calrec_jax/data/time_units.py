"""The unit of a column of times, told by the whole column, and its values in nanoseconds, in SQL.

A number is a time in the one unit in which it lies near our days: seconds until the year 2100; milliseconds, microseconds and
nanoseconds from March 1973 on. Whole numbers that are all dates such as 20140718 are dates. Texts are ISO 8601 dates with or
without a time of day; what does not name its zone is in UTC.
"""

import dataclasses

import duckdb

from calrec_jax.errors import UserError

NANOSECONDS = {'seconds': 10**9, 'milliseconds': 10**6, 'microseconds': 10**3, 'nanoseconds': 1}
UNITS = ('auto', *NANOSECONDS, 'dates')
_YEAR_2100 = 4_102_444_800  # seconds
_MARCH_1973 = 10**8

_NUMBER = r"regexp_full_match(time, '\s*[+-]?[0-9]{1,19}(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?\s*')"
_DATE = (r"regexp_full_match(time, '\s*[0-9]{4}-[0-9]{2}-[0-9]{2}"
         r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?( ?(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?))?)?\s*')")
# DuckDB reads microseconds; the digits below follow.
_SQL_DATE = rf"""(CASE WHEN {_DATE} THEN TRY_CAST(
    epoch_us(TRY_CAST(regexp_replace(trim(time), ' ([+-])', '\1') AS TIMESTAMPTZ))::HUGEINT * 1000
    + rpad(regexp_extract(time, '\.[0-9]{{6}}([0-9]{{1,3}})', 1), 3, '0')::HUGEINT AS BIGINT) END)"""
_COMPACT = r"""CASE WHEN length(time) = 8 THEN regexp_full_match(time, '(19|20)[0-9]{6}')
    AND try_strptime(time, '%Y%m%d') IS NOT NULL ELSE false END"""
# A whole number in its usual form: most columns have nothing else, and this is told several times faster than a pattern.
_WHOLE = "TRY_CAST(time AS BIGINT)"
_IS_WHOLE = f"coalesce({_WHOLE}::VARCHAR = time, false)"


@dataclasses.dataclass(frozen=True)
class Times:
  """What a column of times is.

  Attributes:
    unit: a key of `NANOSECONDS`, `dates` (ISO 8601), or `dates as numbers`.
    sql: a value in nanoseconds since 1970 in UTC, BIGINT; NULL where it is no time.
  """

  unit: str
  sql: str


def recognise(connection: duckdb.DuckDBPyConnection, table: str, unit: str, where: str) -> Times:
  """Tells the unit of the column `time` (VARCHAR) of a table.

  Args:
    connection: whose time zone is UTC.
    table: its name.
    unit: one of `UNITS`; other than `auto` it is taken as given.
    where: the file and the column, for messages.

  Raises:
    UserError: no times, times in several units, or times that are in none.
  """
  if unit != 'auto':
    return _times(unit)
  rows = connection.execute(f"""
      SELECT kind, count(*), left(arg_min(time, rowid), 80), count(*) FILTER ({_COMPACT})
      FROM (SELECT time, rowid, {_kind()} AS kind FROM {table}) GROUP BY kind ORDER BY count(*) DESC, kind""").fetchall()
  kinds = {kind: (count, example, n_compact) for kind, count, example, n_compact in rows if kind not in ('none', 'empty')}
  cure = 'write all of them in one unit, or name it by --time_unit'
  if not kinds:
    example = next((example for kind, _, example, _ in rows if kind == 'none'), None)
    found = f'holds no times (such as {example!r})' if example is not None else 'holds no times'
    raise UserError(f'{where} {found}; expected seconds, milli-, micro- or nanoseconds since 1970, or ISO 8601 dates.')
  if 'no unit' in kinds:
    raise UserError(f'{where} holds {kinds["no unit"][1]!r}, which is in no unit a time between 1973 and 2100; {cure}.')
  if len(kinds) > 1:
    told = ' and '.join(f'{kind} ({count:,}, such as {example!r})' for kind, (count, example, _) in kinds.items())
    raise UserError(f'{where} mixes {told}; {cure}.')
  [(found, (count, _, n_compact))] = kinds.items()
  return _times('dates as numbers' if n_compact == count else found)


def _kind() -> str:
  """SQL: what one value looks like."""
  windows = ' '.join(
      f"WHEN {name} THEN '{unit}'" for unit, name in
      [('seconds', f'size < {_YEAR_2100}')] + [
          (unit, f'size >= {_MARCH_1973 * (10**9 // factor)} AND size < {_YEAR_2100 * (10**9 // factor)}')
          for unit, factor in NANOSECONDS.items() if unit != 'seconds'])
  sizes = [windows.replace('size', f'abs({number})') for number in (f'{_WHOLE}::HUGEINT', 'TRY_CAST(time AS DECIMAL(28, 9))')]
  return f"""CASE WHEN time IS NULL THEN 'empty'
      WHEN {_IS_WHOLE} THEN CASE {sizes[0]} ELSE 'no unit' END
      WHEN {_NUMBER} THEN CASE {sizes[1]} ELSE 'no unit' END
      WHEN {_SQL_DATE} IS NOT NULL THEN 'dates' ELSE 'none' END"""


def _times(unit: str) -> Times:
  if unit == 'dates':
    return Times(unit, _SQL_DATE)
  if unit == 'dates as numbers':
    return Times(unit, "(epoch_us(try_strptime(time, '%Y%m%d')) * 1000)")
  factor = NANOSECONDS[unit]
  return Times(unit, f"""(CASE WHEN {_IS_WHOLE} THEN TRY_CAST({_WHOLE}::HUGEINT * {factor} AS BIGINT)
      WHEN {_NUMBER} THEN TRY_CAST(floor(TRY_CAST(time AS DECIMAL(28, 9)) * {factor}::DECIMAL(10, 0)) AS BIGINT) END)""")
