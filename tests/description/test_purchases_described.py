"""What is counted of histories, against plain loops over random data sets."""

import datetime

import pytest
from hypothesis import given
from random_histories import data_sets, rows

from calrec_jax.data.histories import load
from calrec_jax.description import purchases


def share(part):
  return part['count'], pytest.approx(part['share'])


def of(count, total):
  return count, count / total if total else 0


@given(data_sets())
def test_sizes_and_popularity(data):
  histories = rows(data)
  pairs = {(user, item) for user, history in enumerate(histories) for item in history}
  assert purchases.sizes(data) == {
      'users': len(histories), 'items': len(data.item_ids), 'events': sum(map(len, histories)), 'pairs': len(pairs),
      'density': len(pairs) / (len(histories) * len(data.item_ids))}
  counts = [sum(history.count(item) for history in histories) for item in range(len(data.item_ids))]
  found = purchases.popularity(data)
  assert sum(each['count'] for each in found['histogram']) == len(counts)
  assert found['quantiles']['max'] == max(counts) and found['top'][-1]['percent'] == 50
  half = -(-len(counts) // 2)
  assert (found['top'][-1]['items'], found['top'][-1]['events']) == (half, sum(sorted(counts, reverse=True)[:half]))
  assert purchases.length(data)['quantiles']['min'] == min(map(len, histories))


@given(data_sets())
def test_repeats(data):
  histories = rows(data)
  n_events, n_users = len(data.events), len(histories)
  found = purchases.repeats(data)
  places = [(history, place) for history in histories for place in range(len(history))]
  before = lambda history, place: history[place] in history[:place]
  assert share(found['consecutive']) == of(sum(place > 0 and h[place] == h[place - 1] for h, place in places), n_events)
  assert share(found['any']) == of(sum(before(h, place) for h, place in places), n_events)
  assert share(found['users']) == of(sum(len(set(h)) < len(h) for h in histories), n_users)
  assert share(found['last_consecutive']) == of(sum(len(h) > 1 and h[-1] == h[-2] for h in histories), n_users)
  assert share(found['last_any']) == of(sum(len(h) > 0 and before(h, len(h) - 1) for h in histories), n_users)


@given(data_sets())
def test_ties_and_the_order_of_ids(data):
  found, tied, greater = purchases.ties(data), {'events': 0, 'last_two': 0}, {'tied': [], 'tied_last_two': [], 'last_two': []}
  for user in range(len(data.user_ids)):
    start, stop = data.offsets[user:user + 2].tolist()
    for place in range(start + 1, stop):
      earlier, later = (data.item_ids[data.events[each]] for each in (place - 1, place))
      last = place == stop - 1
      same = data.timestamps is not None and bool(data.timestamps[place] == data.timestamps[place - 1])
      tied['events'] += same
      tied['last_two'] += same and last
      for name, holds in (('tied', same), ('tied_last_two', same and last), ('last_two', last)):
        greater[name] += [later > earlier] * (holds and later != earlier)
  for name, pairs in greater.items():
    if name != 'last_two' and data.timestamps is None:
      assert found['greater_id'][name] is None
    else:
      assert found['greater_id'][name]['pairs'] == len(pairs)
      assert share(found['greater_id'][name]) == of(sum(pairs), len(pairs))
  if data.timestamps is None:
    assert found['events'] is None and found['last_two'] is None
  else:
    assert share(found['events']) == of(tied['events'], len(data.events))
    assert share(found['last_two']) == of(tied['last_two'], len(data.user_ids))


@given(data_sets(timed=True, least=1))
def test_periods_hold_every_event_once(data):
  found = purchases.time(data)
  date = lambda time: datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=time)
  written = [date(time).isoformat() for time in sorted(data.timestamps.tolist())]
  assert (found['first'], found['last']) == (f'{written[0]}Z', f'{written[-1]}Z')
  assert 1 <= len(found['periods']) <= purchases.MOST_PERIODS
  for period in found['periods']:
    ends = period['from'], period['to']
    width = len(ends[0])
    assert period['count'] == sum(ends[0] <= text[:width] <= ends[1] for text in written)
  assert sum(period['count'] for period in found['periods']) == len(written)


def test_without_times_there_are_no_periods(tiny_store):
  assert purchases.time(load(tiny_store / 'data/books')) is None
