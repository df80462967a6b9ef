"""Law 11 on every format: what is made of a dump, however written and filtered, is what a plain loop makes of its events."""

import collections
import csv
import gzip
import hashlib
import io
import json
import pathlib
import tempfile
import typing

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from calrec_jax.data import amazon, cleaning, dump_formats, dump_rules, filtering, histories
from calrec_jax.errors import UserError

SOME_DAY = 1_400_000_000
CSV_COLUMNS = {'ratings 2014': ('user', 'item', 'rating', 'time'), 'ratings 2018': ('item', 'user', 'rating', 'time'),
               'ratings 2023': ('user', 'item', 'rating', 'time')}
FORMATS = ['2014', '2018', '2023', *CSV_COLUMNS]


class Event(typing.NamedTuple):
  """A review: `time` in milliseconds."""
  user: str
  item: str
  time: int
  rating: float | None
  verified: bool | None


class Item(typing.NamedTuple):
  """A line of metadata."""
  item: str
  title: object
  levels: list[str]
  brand: object
  price: object


def review_lines(events, form):
  """The lines of a dump that holds these events."""
  if form in CSV_COLUMNS:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    if form == 'ratings 2023':
      writer.writerow(['user_id', 'parent_asin', 'rating', 'timestamp'])
    for event in events:
      time = event.time if form == 'ratings 2023' else event.time // 1000
      named = {'user': event.user, 'item': event.item, 'rating': '' if event.rating is None else event.rating, 'time': time}
      writer.writerow([named[column] for column in CSV_COLUMNS[form]])
    return text.getvalue().encode()
  rows = []
  for event in events:
    if form == '2023':
      row = {'rating': event.rating, 'title': 'x', 'asin': 'other', 'parent_asin': event.item, 'user_id': event.user,
             'timestamp': event.time, 'verified_purchase': event.verified}
    else:
      row = {'reviewerID': event.user, 'asin': event.item, 'overall': event.rating, 'unixReviewTime': event.time // 1000,
             'reviewText': '"a"\nb', **({'helpful': [0, 0]} if form == '2014' else {'verified': event.verified})}
    rows.append({key: value for key, value in row.items() if value is not None})
  return b''.join(json.dumps(row, ensure_ascii=False).encode() + b'\n' for row in rows)


def meta_lines(items, form):
  """The lines of a dump's metadata; those of 2014 are Python's."""
  rows = {
      '2014': [{'asin': i.item, 'title': i.title, 'brand': i.brand, 'price': i.price, 'categories': [i.levels, ['other path']]}
               for i in items],
      '2018': [{'category': i.levels, 'title': i.title, 'brand': i.brand, 'price': i.price, 'asin': i.item} for i in items],
      '2023': [{'main_category': 'M', 'title': i.title, 'price': i.price, 'store': i.brand, 'categories': i.levels,
                'details': {'Brand': 'no'}, 'parent_asin': i.item} for i in items],
  }[form]
  return ''.join((repr(row) if form == '2014' else json.dumps(row, ensure_ascii=False)) + '\n' for row in rows).encode()


def plain_histories(events, rules):
  """{user: [(item, seconds), …]}, written as one would say it."""
  if rules.since is not None:
    events = [event for event in events if event.time // 1000 >= rules.since]
  if rules.until is not None:
    events = [event for event in events if event.time // 1000 < rules.until]
  if rules.verified_only:
    events = [event for event in events if event.verified]
  if rules.min_rating is not None:
    events = [event for event in events if event.rating is not None and event.rating >= rules.min_rating]
  while True:
    users, items = (collections.Counter(event[place] for event in events) for place in (0, 1))
    kept = [event for event in events if min(users[event.user], items[event.item]) >= rules.min_count]
    ended, events = rules.core == 'once' or len(kept) == len(events), kept
    if ended:
      break
  found = collections.defaultdict(list)
  def order(event):
    return event.time, hashlib.md5(f'{event.user}\n{event.item}'.encode()).hexdigest()[:16] if rules.ties == 'hashed' else ''
  for event in sorted(events, key=order):
    history = found[event.user]
    seen = {'consecutive': [item for item, _ in history[-1:]], 'none': [], 'first': [item for item, _ in history]}
    if event.item not in seen[rules.dedup]:
      history.append((event.item, event.time // 1000))
  return {user: history for user, history in sorted(found.items()) if len(history) >= rules.min_length}


def plain_items(ids, lines, rules):
  """The texts of these items: those of the first line with a usable title, else of the first line."""
  texts = []
  for item_id in sorted(ids):
    own = [line for line in lines if line.item == item_id]
    own = own or [Item(item_id, None, [], None, None)]
    line = next((line for line in own if cleaning.clean_text(line.title)), own[0])
    texts.append({
        'title': cleaning.clean_text(line.title), 'category': cleaning.clean_category(line.levels, rules.category_depth),
        'brand': cleaning.clean_brand(line.brand), 'price': '' if rules.no_price else cleaning.clean_price(line.price)})
  return texts


def seen_by(event, form):
  """What a format says of an event."""
  return event._replace(time=event.time if form.endswith('2023') else event.time // 1000 * 1000,
                        verified=event.verified if form in ('2018', '2023') else None)


def check_law(events, lines, form, *, meta_form='2018', gzipped=False, **settings):
  """Asserts law 11 on a dump of these events and of these lines of metadata."""
  settings = {'csv_columns': ','.join(CSV_COLUMNS[form]) if form in CSV_COLUMNS else None, **settings}
  rules = dump_rules.Rules(**settings)
  expected = plain_histories([seen_by(event, form) for event in events], rules)
  ids = {item for history in expected.values() for item, _ in history}
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder) / f'{name}.{"gz" if gzipped else "txt"}' for name in ('reviews', 'meta')]
    for path, content in zip(paths, (review_lines(events, form), meta_lines(lines, meta_form)), strict=True):
      path.write_bytes(gzip.compress(content) if gzipped else content)
    arguments = {'name': 'law', 'out': f'{folder}/out', 'progress': False, **settings}
    described = ids & {line.item for line in lines}
    if not expected or not described:
      with pytest.raises(UserError, match='describes none' if expected else 'Nothing is left'):
        amazon.prepare_dumps(paths[:1], paths[1:], **arguments)
      return
    description = amazon.prepare_dumps(paths[:1], paths[1:], **arguments)
    data = histories.load(f'{folder}/out')
  times = data.timestamps.tolist()
  found = {user_id: [(data.item_ids[item], time) for item, time in
                     zip(data.history(user), times[data.offsets[user]:data.offsets[user + 1]], strict=True)]
           for user, user_id in enumerate(data.user_ids)}
  assert found == expected and list(found) == list(expected)
  assert data.item_ids == sorted(ids)
  assert data.items == plain_items(ids, lines, rules)
  assert description['metadata']['items_without'] == len(ids) - len(described)
  if not form.startswith('ratings'):
    assert description['sources'][0].get('format', 'Amazon 2018') == f'Amazon {form}'


IDS = strategies.sampled_from(['a', 'A', 'a ', 'é', 'e\u0301', '\U0001f381', 'שלום', ' ', '"', "'", '\\u0000', 'a,b', '0'])
EVENTS = strategies.builds(
    Event, IDS, IDS, strategies.builds(lambda day, part: (SOME_DAY + day) * 1000 + part, strategies.integers(0, 2),
                                       strategies.sampled_from([0, 1, 999])),
    strategies.sampled_from([None, 1.0, 3.5, 5.0, 5]), strategies.sampled_from([None, True, False]))
TEXTS = strategies.one_of(
    strategies.none(), strategies.text(strategies.characters(exclude_categories=['Cs']), max_size=12), strategies.sampled_from([
        '<b>Bold</b> &amp; &lt;i&gt;', '\u202eשלום', 'مرحبا', '🎁🎁', 'by\n    \n    X', "it's \"q\"", '<a href="x',
        'line\r\nbreak', '<script>var a = 1;', 'word ' * 20_000, '<a b=' * 20_000]))
PRICES = strategies.sampled_from([None, '', '$1,299.00 - $1,499.00', '$12.99', 12.99, 7, 0, 1e300, '—', 'from 14.99', True])
LINES = strategies.builds(Item, IDS, TEXTS, strategies.lists(TEXTS.filter(lambda text: text is not None), max_size=4), TEXTS,
                          PRICES)
RULES = strategies.fixed_dictionaries({}, optional={
    'min_count': strategies.integers(0, 3), 'min_length': strategies.integers(1, 3),
    'core': strategies.sampled_from(dump_rules.CORES), 'ties': strategies.sampled_from(['dump', 'hashed']),
    'dedup': strategies.sampled_from(sorted(filtering.DEDUP)),
    'since': strategies.integers(SOME_DAY, SOME_DAY + 1), 'until': strategies.integers(SOME_DAY + 2, SOME_DAY + 3),
    'verified_only': strategies.booleans(), 'min_rating': strategies.sampled_from([1, 3.5, 4]),
    'no_price': strategies.booleans(), 'category_depth': strategies.integers(1, 3)})


@pytest.mark.parametrize('form', FORMATS)
@hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(strategies.lists(EVENTS, min_size=5, max_size=60), strategies.lists(LINES, max_size=20),
                  strategies.sampled_from(['2014', '2018', '2023']), strategies.booleans(), RULES)
def test_law_11_on_any_dump(form, events, lines, meta_form, gzipped, rules):
  check_law(events, lines, form, meta_form=meta_form, gzipped=gzipped, **{'min_count': 2, 'min_length': 2} | rules)


def some_events(n=800):
  """Events with many ties, of a second and of a millisecond, and with repeats."""
  rng = np.random.default_rng(0)
  users, items = np.minimum(rng.geometric(0.06, (2, n)), [[40], [25]])
  times = (SOME_DAY + rng.integers(4, size=n)) * 1000 + rng.choice([0, 7, 999], size=n)
  return [Event(f'A{user:012}', f'B{item * 7919 % 97:09}', int(time), float(stars), bool(stars % 2))
          for user, item, time, stars in zip(users, items, times, rng.integers(1, 6, size=n), strict=True)]


SOME_LINES = [Item(f'B{number:09}', f'T{number}', ['C', 'D'], 'E', 3.5) for number in range(97)]


def milliseconds_cut_off(monkeypatch):
  monkeypatch.setitem(filtering.EVENT_ORDERS, 'hashed', 'time, tie, line')


def one_round(monkeypatch):
  monkeypatch.setattr(filtering, 'k_core', filtering.frequent)


def any_rating(monkeypatch):
  monkeypatch.setattr(amazon, '_conditions', lambda rules: iter(()))


def columns_swapped(monkeypatch):
  monkeypatch.setattr(dump_formats, 'csv_places', lambda columns: ('user_id', 'item_id', 'rating', 'time'))


@pytest.mark.parametrize(('mutate', 'form', 'rules'), [
    (milliseconds_cut_off, '2023', {'ties': 'hashed'}), (one_round, '2014', {'min_count': 12}),
    (any_rating, '2018', {'min_rating': 3}), (columns_swapped, 'ratings 2018', {})])
def test_law_11_fails_on_mutants(monkeypatch, mutate, form, rules):
  check_law(some_events(), SOME_LINES, form, **rules)
  mutate(monkeypatch)
  with pytest.raises((AssertionError, UserError)):
    check_law(some_events(), SOME_LINES, form, **rules)


@pytest.mark.parametrize('form', CSV_COLUMNS)
def test_the_ids_tell_the_columns_of_a_csv(form):
  check_law(some_events(), SOME_LINES, form, csv_columns=None)
