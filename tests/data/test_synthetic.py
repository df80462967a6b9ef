"""The generated store: its dirt is there and is cleaned away, its histories follow the oracle, baselines stay weak."""

import collections
import dataclasses
import gzip
import json
import os
import re

import numpy as np
import pytest

from calrec_jax.data import amazon, histories, oracle, store_words, synthetic
from calrec_jax.errors import UserError

USERS, ITEMS = 1200, 250


@dataclasses.dataclass
class Store:
  """A store, with what was drawn for its first category: (user, item, day), and that category prepared."""
  path: os.PathLike
  report: dict
  drawn: list
  data: histories.Histories
  description: dict
  oracle: oracle.Oracle

  def rows(self, kind, category=0):
    path = self.path / self.report['categories'][category][kind]
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]

  def transitions(self):
    """(context, item) of each event after the first, as item ids."""
    for user in range(len(self.data.user_ids)):
      ids = [self.data.item_ids[item] for item in self.data.history(user)]
      yield from ((ids[:end], ids[end]) for end in range(1, len(ids)))


def prepare(store, report, out, category=0, **options):
  name, reviews, meta = (report['categories'][category][key] for key in ('name', 'reviews', 'meta'))
  return amazon.prepare_dumps([store / reviews], [store / meta], name=name, out=out, **options)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  folder, drawn = tmp_path_factory.mktemp('store'), []
  purchases = synthetic._purchases
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(synthetic, '_purchases', lambda *args: (drawn.append(event) or event for event in purchases(*args)))
    report = synthetic.synthesize(folder / 'store', users=USERS, items=ITEMS, categories=2, seed=7)
  name = report['categories'][0]['name']
  n_first = next(i for i in range(1, len(drawn)) if drawn[i][0] < drawn[i - 1][0])  # where the second category begins
  description = prepare(folder / 'store', report, folder / name)
  return Store(folder / 'store', report, drawn[:n_first], histories.load(folder / name), description,
               oracle.load_oracle(folder / 'store', name))


def test_prepared_histories_are_what_was_drawn(store, tmp_path):
  """Repeats are dropped and ties are put right; all that a history can lack is an item that fell to the k-core."""
  prepare(store.path, store.report, tmp_path / 'whole', min_count=1)
  data = histories.load(tmp_path / 'whole')
  expected = collections.defaultdict(list)
  for user, item, _ in store.drawn:
    expected[user].append(store.oracle.item_ids[item])
  found = [[data.item_ids[item] for item in data.history(user)] for user in range(len(data.user_ids))]
  assert sorted(found) == sorted(expected.values())


def test_the_core_keeps_nearly_all(store, tmp_path):
  for category in range(2):
    stats = prepare(store.path, store.report, tmp_path / str(category), category)['statistics']
    assert stats['users'] > 0.9 * USERS and stats['items'] > 0.9 * ITEMS
    assert 5 <= stats['length']['min'] and stats['length']['max'] <= 15 and 7 < stats['length']['mean'] < 9
    assert stats['last_repeats_previous'] == 0


def test_reviews_have_the_dirt_of_real_ones(store):
  rows = store.rows('reviews')
  events = [(row['reviewerID'], row['unixReviewTime']) for row in rows]
  n_repeated = sum(one['asin'] == two['asin'] and events[i] == events[i + 1]
                   for i, (one, two) in enumerate(zip(rows, rows[1:], strict=False)))
  assert 0.01 < n_repeated / len(rows) < 0.03  # published twice
  assert 0.01 < 1 - len(set(events)) / len(rows) - n_repeated / len(rows) < 0.1  # tied with another item
  assert all(row['unixReviewTime'] % 86_400 == 0 for row in rows)
  products = [row['asin'] for row in rows]
  assert sum(one != two for one, two in zip(products, products[1:], strict=False)) == len(set(products)) - 1
  assert store.description['steps'][2]['dropped'] == n_repeated


def test_metadata_have_the_dirt_of_real_ones(store):
  rows = [row for category in range(2) for row in store.rows('meta', category)]
  titles, prices = ' | '.join(row['title'] for row in rows), ' | '.join(row['price'] for row in rows)
  for dirt in ('&amp; ', '&amp;amp;', '&#39;', '<span class="a-size-medium a-color-secondary"', '<span id=', '&nbsp;'):
    assert dirt in titles
  assert '.a-box-inner' in prices and '<div class=' in prices
  assert any(row['brand'].startswith('by\n') for row in rows) and any('</span>' in str(row['category']) for row in rows)
  assert all(any(not row[field] for row in rows) for field in ('category', 'brand', 'price'))
  n_lines = collections.Counter(row['asin'] for row in rows)
  bought = {row['asin'] for category in range(2) for row in store.rows('reviews', category)}
  assert max(n_lines.values()) == 2 and bought < n_lines.keys()
  assert store.description['metadata']['repeated_lines'] > 0


def test_cleaning_takes_all_the_dirt_away(store):
  kinds = store_words.THEMES[store.data.name][1]
  title = re.compile(rf'[A-Z][a-z]+ [A-Z][a-z]+ ({"|".join(store_words.MARKS)}) ({"|".join(kinds)}) Volume [1-5]')
  for item in store.data.items:
    assert not item['title'] or title.fullmatch(item['title'])
    assert not item['price'] or re.fullmatch(r'\$\d+\.99', item['price'])
    assert not item['brand'] or re.fullmatch('[A-Z][a-z]+', item['brand'])
    assert not item['category'] or item['category'].split(', ')[-1] in kinds
    assert not (item['title'] and item['brand']) or item['title'].startswith(item['brand'])


def test_texts_of_twins_are_equal_and_of_others_are_not(store):
  unknown = store.description['statistics']['unknown']
  assert 0 < unknown['title'] < 0.05 and 0 < unknown['brand'] < 0.15 and 0.05 < unknown['price'] < 0.25
  rules = store.oracle
  places = dict(zip(rules.item_ids, zip(rules.brands, rules.kinds, rules.volumes, strict=True), strict=True))
  titles = collections.defaultdict(set)
  for item_id, item in zip(store.data.item_ids, store.data.items, strict=True):
    if item['title']:
      titles[item['title']].add(places[item_id])
  assert all(len(of_title) == 1 for of_title in titles.values())
  assert 2 <= store.description['statistics']['items_with_duplicate_text'] < 20


def test_ids_are_of_one_category_each_and_tell_nothing(store):
  items, users = ([{row[key] for row in store.rows('reviews', category)} for category in range(2)]
                  for key in ('asin', 'reviewerID'))
  assert not items[0] & items[1] and not users[0] & users[1]
  popularity = store.oracle.popularity[np.argsort(store.oracle.item_ids)]
  assert abs(np.corrcoef(np.arange(ITEMS), popularity)[0, 1]) < 0.2


def log_likelihood(rules, store):
  """Mean log P(next | context) over all transitions, nats."""
  return np.mean([np.log(rules.probabilities(context, [item])[0]) for context, item in store.transitions()])


def other_rules(rules):
  """Rules near the generator's; each lacks something of it."""
  for rule, weight in rules.weights.items():
    for factor in (0.7, 1.4):
      yield f'{rule} x {factor}', dataclasses.replace(rules, weights=rules.weights | {rule: factor * weight})
  yield 'flat popularity', dataclasses.replace(rules, popularity=np.full(ITEMS, 1 / ITEMS))
  yield 'one volume on', dataclasses.replace(rules, volumes=(rules.volumes + 1) % synthetic.N_VOLUMES)


def test_the_oracle_is_the_generator(store):
  own = log_likelihood(store.oracle, store)
  assert -2.6 < own < -1.9
  for what, rules in other_rules(store.oracle):
    assert log_likelihood(rules, store) < own, what


def test_the_oracle_is_calibrated(store):
  """Hits of its first choice: as many as it says, within four standard deviations."""
  expected = variance = hits = 0
  for context, item in store.transitions():
    p = store.oracle.probabilities(context, store.oracle.item_ids)
    best = p.argmax()
    expected, variance = expected + p[best], variance + p[best] * (1 - p[best])
    hits += store.oracle.item_ids[best] == item
  assert abs(hits - expected) < 4 * variance**0.5


def ndcg_at_10(scores_of, store):
  """NDCG@10 over the last events; ties are broken against the target."""
  gains = []
  for user in range(len(store.data.user_ids)):
    *context, target = store.data.history(user).tolist()
    scores_I = scores_of(context)
    rank = (scores_I >= scores_I[target]).sum()
    gains.append(1 / np.log2(rank + 1) if rank <= 10 else 0)
  return np.mean(gains)


def test_simple_baselines_are_far_below_the_ceiling(store):
  n_items, data = len(store.data.item_ids), store.data
  before_last = np.delete(data.events, data.offsets[1:] - 1)
  popularity = ndcg_at_10(lambda context: np.bincount(before_last, minlength=n_items), store)
  last_item = ndcg_at_10(lambda context: np.eye(n_items)[context[-1]], store)
  ids = data.item_ids
  ceiling = ndcg_at_10(lambda context: store.oracle.probabilities([ids[item] for item in context], ids), store)
  assert popularity < 0.12 and last_item < 0.05
  assert 0.5 < ceiling < 0.75


def test_the_same_seed_gives_the_same_bytes(tmp_path):
  for out, seed in (('one', 3), ('two', 3), ('other', 4)):
    synthetic.synthesize(tmp_path / out, users=30, items=20, categories=2, seed=seed)
  files = [path.relative_to(tmp_path / 'one') for path in sorted((tmp_path / 'one').rglob('*')) if path.is_file()]
  assert len(files) == 7
  for file in files:
    assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()
    assert (tmp_path / 'one' / file).read_bytes() != (tmp_path / 'other' / file).read_bytes()


@pytest.mark.parametrize('items', [10, 11, 59, 61])
def test_any_number_of_items_will_do(tmp_path, items):
  report = synthetic.synthesize(tmp_path / 'store', users=20, items=items, categories=len(store_words.THEMES), seed=1)
  assert [category['name'] for category in report['categories']] == list(store_words.THEMES)
  for category in range(len(store_words.THEMES)):
    prepare(tmp_path / 'store', report, tmp_path / str(category), category, min_count=1)
    assert len(oracle.load_oracle(tmp_path / 'store', report['categories'][category]['name']).item_ids) == items


@pytest.mark.parametrize('options', [{'users': 0}, {'items': 9}, {'categories': 0}, {'categories': 9}, {'seed': -1}])
def test_numbers_out_of_range_are_named(tmp_path, options):
  (what, value), = options.items()
  with pytest.raises(UserError, match=f'--{what} {value}: choose from'):
    synthetic.synthesize(tmp_path / 'x', **options)
  assert not os.listdir(tmp_path)


def test_an_output_in_use_is_left_alone(tmp_path):
  (tmp_path / 'mine').write_text('precious')
  with pytest.raises(UserError, match='already in use'):
    synthetic.synthesize(tmp_path, users=5, items=10, categories=1, seed=0)
  assert os.listdir(tmp_path) == ['mine']
