"""A generated store, written as raw dumps in the format of the Amazon Review Data 2018, with the real dumps' dirt.

A category is a store of its own: `users` and `items` count per category, a user shops in one category, an asin is in
one. What users buy follows `data/oracle.py`. The dirt, as it is found in the real dumps:

  reviews    a few are published twice; times are whole days, and some of a user's events share one. Files list reviews
             by product, newest first. An event shares its day with the one before only where the file's order is the
             true one, so that (time, line) still tells the true order and the oracle's probabilities stay exact
             (but where the k-core takes a rare item out of a history).
  metadata   entities, also escaped twice, and tags in texts; unfinished tags for titles; style sheets and markup for
             prices; 'by' and line breaks in brands; markup behind category levels; missing attributes; repeated
             lines, some of which have lost their title; products that nobody bought; twins: two items, one text.
"""

import dataclasses
import datetime
import html
import os
from collections.abc import Iterable

import numpy as np
import tqdm

from calrec_jax import outputs
from calrec_jax.data import json_lines, oracle, store_words
from calrec_jax.errors import UserError

N_VOLUMES = 5
MIN_EVENTS, MAX_EVENTS = 5, 15
_DAY_SECONDS = 86_400
_FIRST_DAY = datetime.date(2013, 1, 1)
_ID_LETTERS = np.array(list('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'))
_STYLE_SHEET = '.a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{border-color:#e77600}'
_UNFINISHED_TAG = '<span class="a-size-medium a-color-secondary"'
_OPINIONS = ('Five Stars', 'As described', 'Works well', 'Good value', 'My second one', 'A gift for my sister')


def synthesize(out: str | os.PathLike, *, users: int = 1200, items: int = 250, categories: int = 3, seed: int = 0,
               progress: bool = True) -> dict:
  """Writes a store: `<Category>_5.json.gz` and `meta_<Category>.json.gz` for each category, and the folder `oracle`.

  The same arguments give the same bytes.

  Args:
    out: the new folder; it appears whole or not at all.
    users: per category.
    items: that can be bought, per category; metadata list some more.
    categories: how many of `store_words.THEMES`, in that order.
    seed: of all randomness.
    progress: whether to show progress on stderr.

  Returns:
    What `store.json` holds: the options and, for each category, its name and files.

  Raises:
    UserError: a number out of range, or `out` in use.
  """
  for what, value, least, most in (('users', users, 1, 10**7), ('items', items, 10, 50_000),
                                   ('categories', categories, 1, len(store_words.THEMES)), ('seed', seed, 0, 2**63)):
    if not least <= value <= most:
      raise UserError(f'--{what} {value}: choose from {least} to {most}.')
  rng = np.random.default_rng(seed)
  ids = _Ids(rng)
  brand_words, line_words = store_words.invented_words(rng, 3), store_words.invented_words(rng, 2)[:64]
  rows = []
  with outputs.new_folder(out) as scratch:
    for name in tqdm.tqdm(list(store_words.THEMES)[:categories], desc='generating the store', leave=False, delay=1,
                          disable=not progress):
      shop = _stock(name, items, ids, brand_words, line_words, rng)
      reviews, meta = f'{name}_5.json.gz', f'meta_{name}.json.gz'
      json_lines.write(scratch / reviews, _review_rows(shop, users, ids, rng), ensure_ascii=True)
      json_lines.write(scratch / meta, _meta_rows(shop, ids, rng), ensure_ascii=True)
      oracle.save_oracle(scratch, name, shop.oracle)
      rows.append({'name': name, 'reviews': reviews, 'meta': meta})
    store = {'users_per_category': users, 'items_per_category': items, 'seed': seed, 'categories': rows}
    outputs.write_json(scratch / 'store.json', store)
  return store


class _Ids:
  """Hands out ids that tell nothing, each once in the store."""

  def __init__(self, rng: np.random.Generator):
    self.rng = rng
    self.used: set[str] = set()

  def new(self, prefix: str, n_letters: int) -> str:
    while True:
      new = prefix + ''.join(_ID_LETTERS[self.rng.integers(len(_ID_LETTERS), size=n_letters)])
      if new not in self.used:
        self.used.add(new)
        return new


@dataclasses.dataclass(frozen=True)
class _Shop:
  """One category: its rules, and each item's attributes (title, category, brand, price), clean."""

  oracle: oracle.Oracle
  items: list[dict]


def _stock(name: str, n_items: int, ids: _Ids, brand_words: list[str], line_words: list[str], rng: np.random.Generator
           ) -> _Shop:
  """Invents a category's items: brands x kinds x volumes, as far as `n_items` goes, and a few twins among them."""
  levels, kind_names = store_words.THEMES[name]
  n_twins = max(n_items // 60, 1)
  places = np.arange(n_items - n_twins)
  places = np.concatenate([places, rng.choice(places, n_twins, replace=False)])
  brands, kinds, volumes = np.unravel_index(places, (n_items, len(kind_names), N_VOLUMES))
  lines = brands * len(kind_names) + kinds
  n_brands, n_lines = brands.max() + 1, lines.max() + 1
  names = [brand_words.pop() for _ in range(n_brands)]
  words = [[line_words[word] for word in rng.permutation(len(line_words))[:len(kind_names)]] for _ in range(n_brands)]
  marks, base_dollars = rng.integers(len(store_words.MARKS), size=n_lines), rng.integers(3, 40, size=n_lines)
  items = []
  for brand, kind, volume, line in zip(brands, kinds, volumes, lines, strict=True):
    mark = store_words.MARKS[marks[line]]
    items.append({
        'title': f'{names[brand]} {words[brand][kind]} {mark} {kind_names[kind]} Volume {volume + 1}',
        'category': [*levels, kind_names[kind]],
        'brand': names[brand],
        'price': f'${base_dollars[line] + 2 * volume}.99',
    })
  ranks = rng.permutation(n_brands)[brands] + 1
  popularity = ranks**-0.6 * rng.lognormal(sigma=0.4, size=n_lines)[lines] * 0.85**volumes
  popularity *= rng.uniform(0.8, 1.2, n_items)
  asins = tuple(ids.new('B0', 8) for _ in items)
  return _Shop(oracle.Oracle(asins, brands, kinds, volumes, popularity / popularity.sum()), items)


def _purchases(rules: oracle.Oracle, n_users: int, position: np.ndarray, rng: np.random.Generator
               ) -> Iterable[tuple[int, int, int]]:
  """Yields (user, item, day): histories drawn from the rules; `position` int64 [I] is the items' order in the file."""
  n_items = len(rules.item_ids)
  for user in range(n_users):
    n_events = min(MIN_EVENTS - 1 + rng.geometric(0.25), MAX_EVENTS)
    day = int(rng.integers(0, 1500))
    history: list[int] = []
    for _ in range(n_events):
      item = int(rng.choice(n_items, p=rules.row(*history[-2:])))
      if history and not (rng.random() < 0.1 and position[item] > position[history[-1]]):
        day += int(rng.geometric(0.05))
      history.append(item)
      yield user, item, day


def _review_rows(shop: _Shop, n_users: int, ids: _Ids, rng: np.random.Generator) -> Iterable[dict]:
  """The reviews in the order of the file: by product, and newest first."""
  n_items = len(shop.items)
  position = rng.permutation(n_items)
  user_ids = [ids.new('A', 13) for _ in range(n_users)]
  events = sorted(_purchases(shop.oracle, n_users, position, rng), key=lambda event: (position[event[1]], -event[2]))
  for user, item, day in events:
    row = _review(user_ids[user], shop.oracle.item_ids[item], day, rng)
    yield row
    if rng.random() < 0.02:  # published twice
      yield row | {'vote': '2'} if rng.random() < 0.5 else row


def _review(user_id: str, asin: str, day: int, rng: np.random.Generator) -> dict:
  date = _FIRST_DAY + datetime.timedelta(days=day)
  seconds = (date - datetime.date(1970, 1, 1)).days * _DAY_SECONDS
  opinion = _OPINIONS[rng.integers(len(_OPINIONS))]
  row = {'overall': float(rng.integers(3, 6)), 'verified': bool(rng.random() < 0.9),
         'reviewTime': f'{date:%m} {date.day}, {date.year}', 'reviewerID': user_id, 'asin': asin}
  if rng.random() < 0.3:
    row['style'] = {'Format:': ' Boxed'}
  return row | {'reviewerName': 'x', 'reviewText': f'{opinion}.\nWould buy again.', 'summary': opinion,
                'unixReviewTime': seconds}


def _meta_rows(shop: _Shop, ids: _Ids, rng: np.random.Generator) -> list[dict]:
  """The metadata in the order of the file: all items, some twice, and products that nobody bought."""
  rows = []
  texts: dict[str, dict] = {}  # twins share their dirt, so that they share their text
  for asin, item in zip(shop.oracle.item_ids, shop.items, strict=True):
    row = texts.setdefault(item['title'], _dirty(_with_gaps(item, rng), rng)) | {'asin': asin}
    rows.append([row])
    if rng.random() < 0.1:
      rows[-1].insert(int(rng.integers(2)), row | {'title': row['title'] if rng.random() < 0.5 else _UNFINISHED_TAG})
  for number in range(len(shop.items) // 10):
    unsold = shop.items[number] | {'title': shop.items[number]['title'].replace('Volume', 'Poster')}
    rows.append([_dirty(_with_gaps(unsold, rng), rng) | {'asin': ids.new('B0', 8)}])
  return [_meta(row) for index in rng.permutation(len(rows)) for row in rows[index]]


def _meta(row: dict) -> dict:
  return {'category': row['category'], 'tech1': '', 'description': [], 'fit': '', 'title': row['title'], 'also_buy': [],
          'brand': row['brand'], 'feature': [], 'rank': [], 'date': '', 'price': row['price'], 'asin': row['asin']}


def _with_gaps(item: dict, rng: np.random.Generator) -> dict:
  """The item with some attributes unknown, as the dumps write it: an empty text, a list without levels."""
  gaps = rng.random(4) < [0.0, 0.03, 0.05, 0.12]
  return {field: (value if not gap else type(value)()) for (field, value), gap in zip(item.items(), gaps, strict=True)}


def _dirty(item: dict, rng: np.random.Generator) -> dict:
  """The item's attributes as a crawler would have brought them in; cleaning them gives `item`'s, or unknown ones."""
  title, brand, price = html.escape(item['title'], quote=False).replace("'", '&#39;'), item['brand'], item['price']
  levels = [html.escape(level) if rng.random() < 0.5 else level for level in item['category']]
  kind = rng.random()
  if kind < 0.02:
    title = _UNFINISHED_TAG
  elif kind < 0.06:
    title = html.escape(title, quote=False)  # escaped twice
  elif kind < 0.09:
    title = f'<span id="productTitle" class="a-size-large">\n  {title}\n</span>'
  elif kind < 0.12:
    title = f'  {title.replace(" ", "  ", 1)}&nbsp;'
  if brand and rng.random() < 0.04:
    brand = f'by\n    \n    {brand}'
  if levels and rng.random() < 0.05:
    levels += ['</span></span></span>', 'Bound in cloth', 'Made to last.']
  if rng.random() < 0.03:
    price = _STYLE_SHEET if rng.random() < 0.5 else '\n\t\t    \r\n   <div class="a-section a-spacing-none"'
  return {'title': title, 'category': levels, 'brand': brand, 'price': price}
