"""Times: their unit is told by the whole column, or they are refused; every value is what Python makes of it."""

import datetime
import decimal

import duckdb
import hypothesis
import pytest
import refusals
from hypothesis import strategies as st

from calrec_jax.data import time_units

UTC = datetime.UTC
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)


def convert(values, unit='auto'):
  """(unit, nanoseconds of each)."""
  connection = duckdb.connect()
  connection.execute("SET TimeZone = 'UTC'; CREATE TABLE raw (time VARCHAR)")
  connection.executemany('INSERT INTO raw VALUES (?)', [[value] for value in values])
  times = time_units.recognise(connection, 'raw', unit, 'x.csv: column "when"')
  return times.unit, [row[0] for row in connection.execute(f'SELECT {times.sql} FROM raw ORDER BY rowid').fetchall()]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.sampled_from(list(time_units.NANOSECONDS)),
                  st.lists(st.decimals(100_000_000, 4_102_444_799, places=9), min_size=1, max_size=5))
def test_numbers_are_recognised_by_their_size(unit, seconds):
  size = 10**9 // time_units.NANOSECONDS[unit]
  with decimal.localcontext(prec=60):
    values = [f'{second * size:.3f}' if unit != 'nanoseconds' else str(int(second * size)) for second in seconds]
    expected = [int(decimal.Decimal(value) * time_units.NANOSECONDS[unit]) for value in values]
  assert convert(values) == (unit, expected)


ZONES = st.sampled_from([None, UTC, *(datetime.timezone(datetime.timedelta(minutes=m)) for m in (120, -210, 345))])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1), timezones=ZONES),
                  st.sampled_from(['T', ' ']), st.sampled_from(['auto', 'seconds', 'microseconds']))
def test_iso_8601_is_what_python_reads(moment, between, precision):
  text = moment.isoformat(between, precision)
  aware = datetime.datetime.fromisoformat(text)
  aware = aware.replace(tzinfo=aware.tzinfo or UTC)
  assert convert([text]) == ('dates', [(aware - EPOCH) // datetime.timedelta(microseconds=1) * 1000])


@pytest.mark.parametrize('values, unit, expected', [
    (['0', '5', '-7.5', '+3', ' 2 '], 'seconds', [0, 5 * 10**9, -75 * 10**8, 3 * 10**9, 2 * 10**9]),
    (['9.7830076E8', '978300760.0'], 'seconds', [978300760 * 10**9] * 2),
    (['2014-07-18', '2014-07-18T00:00Z', '2014-07-18 02:00:00+02', '2014-07-17T20:30:00 -0330', '2014-07-18 00:00:00 UTC'],
     'dates', [1405641600 * 10**9] * 5),
    (['2014-07-18 00:00:00.123456789', '2014-07-18 00:00:00.1234567'], 'dates', [1405641600123456789, 1405641600123456700]),
    (['20140718', '20140719'], 'dates as numbers', [1405641600 * 10**9, 1405728000 * 10**9]),
    (['20140718', '20140799'], 'seconds', [20140718 * 10**9, 20140799 * 10**9]),
])
def test_ways_to_write_a_time(values, unit, expected):
  assert convert(values) == (unit, expected)


@pytest.mark.parametrize('values, words', [
    (['1600000000', '1600000000000'], ["seconds (1, such as '1600000000')", "milliseconds (1, such as '1600000000000')"]),
    (['1600000000000', '0'], ['mixes', 'milliseconds', 'seconds', '--time_unit']),
    (['1600000000', '2014-07-18'], ['mixes', 'seconds', 'dates']),
    (['20140718123000'], ["'20140718123000'", 'in no unit', '--time_unit']),
    (['9' * 19], ['in no unit']),
    (['18.07.2014', '07/18/2014'], ["holds no times (such as '18.07.2014')", 'ISO 8601']),
    (['2014-02-30'], ['holds no times']), (['0x10', '1_000'], ['holds no times']), (['nan', 'inf'], ['holds no times']),
    ([None, None], ['holds no times;']), (['9999-12-31'], ['holds no times']),
])
def test_what_is_no_time_or_of_two_units_is_refused(values, words):
  refusals.refused(lambda: convert(values), 'x.csv: column "when"', *words)


def test_a_unit_that_is_given_is_taken():
  assert convert(['0', '1600000000000'], 'milliseconds') == ('milliseconds', [0, 1600000000000 * 10**6])
  assert convert(['5', '2014-07-18', '9' * 19], 'seconds') == ('seconds', [5 * 10**9, None, None])
  assert convert(['5', '2014-07-18'], 'dates') == ('dates', [None, 1405641600 * 10**9])


def test_a_value_that_is_no_time_among_times_is_null():
  assert convert(['1600000000', 'x', None]) == ('seconds', [1600000000 * 10**9, None, None])
