"""The catalogue of the tests of rankers: the tiny store's items and some that nobody has bought; users, and texts for them."""

import pathlib

from calrec_jax.data import histories

# Items of no history. `cold` is written as the games are; `rare` is a category of three, two of one text.
COLD = {'cold': {'title': 'games c0', 'category': 'red', 'brand': 'o', 'price': '$3'},
        'rare-1': {'title': 'puzzle', 'category': 'toys, rare', 'brand': 'o', 'price': '$1'},
        'rare-2': {'title': 'puzzle', 'category': 'toys, rare', 'brand': 'o', 'price': '$1'},
        'rare-3': {'title': 'books c1', 'category': 'toys, rare', 'brand': '', 'price': ''}}
HISTORIES = (['games-0', 'games-1'], ['books-3'], ['games-4', 'cold', 'games-7', 'games-8'])
# Texts as the first two users' samples may be, with their log-probabilities.
TEXTS = ((['Title: games c0. Category: red. Brand: o. Price: $3.', 'Title: games b0. Category: Unknown.', ''],
          [-1.5, -2.25, -9.0]),
         (['Title: puzzle. Category: toys, rare.', 'nothing of it'], [-3.0, -3.5]))
# Of `RankerOptions`: one choice for most tests, as each is a program. The beam is as wide as the catalogue.
OPTIONS = {'candidates': 20, 'beam_width': 40, 'shortlist_size': 40}


def catalogue(store: pathlib.Path) -> tuple[list[str], list[dict[str, str]]]:
  """Ids and fields: both data sets' items, then `COLD`."""
  parts = [histories.load(store / 'data' / name) for name in ('books', 'games')]
  return ([item_id for part in parts for item_id in part.item_ids] + list(COLD),
          [item for part in parts for item in part.items] + list(COLD.values()))
