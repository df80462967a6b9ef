"""The rules by which the generated store's users buy: the law that the generator draws from, and its table's ceiling.

An item is a volume of a product line; a line is a brand's series of one kind of product. Given the last two items
bought (`previous`, `last`), the next one is drawn from a mixture of

  succession   the next volume of last's line; after the last volume, the first one of the brand's next kind
  companion    the same volume of the brand's next kind
  return       only if last is the companion of previous: the next volume of previous's line
  brand        the brand of last, by popularity
  store        the whole category, by popularity

A rule that has no item to offer is left out, and the weights of the others are scaled up. Items that share all their
attributes (twins) share a rule's weight by popularity. Last itself is never drawn. The first item is drawn by
popularity. The model and the rankers never see any of this.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from calrec_jax import outputs
from calrec_jax.errors import UserError

RULES = {'succession': 0.52, 'companion': 0.14, 'return': 0.3, 'brand': 0.14, 'store': 0.12}


@dataclasses.dataclass(frozen=True)
class Oracle:
  """The rules of one category of the generated store.

  Attributes:
    item_ids: I asins.
    brands, kinds, volumes: int64 [I] each; volumes count from 0.
    popularity: float64 [I], sums to 1.
    weights: of each of `RULES`.
  """

  item_ids: tuple[str, ...]
  brands: np.ndarray
  kinds: np.ndarray
  volumes: np.ndarray
  popularity: np.ndarray
  weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict(RULES))

  def probabilities(self, context_item_ids: Sequence[str], item_ids: Sequence[str]) -> np.ndarray:
    """P(next item | history): float64 over `item_ids`; it sums to less than 1 where they are not the whole category.

    Args:
      context_item_ids: the history, oldest first, without consecutive repeats (as prepared data are); may be empty.
      item_ids: what to give the probabilities of.

    Raises:
      UserError: an item is not of this category of the store.
    """
    last_two = [self._index(item_id) for item_id in context_item_ids[-2:]]
    return self.row(*last_two)[[self._index(item_id) for item_id in item_ids]]

  def row(self, *last_two: int) -> np.ndarray:
    """P(next item | the last two items' indices, or fewer at a history's beginning): float64 [I], read-only."""
    return self._rows(last_two)

  @functools.cached_property
  def _rows(self):
    return functools.lru_cache(maxsize=max(2**24 // len(self.item_ids), 16))(self._compute_row)  # <= 128 MiB

  def _compute_row(self, last_two: tuple[int, ...]) -> np.ndarray:
    row_I = np.zeros(len(self.item_ids))
    for rule, members in self._offers(last_two).items():
      shares = self.popularity[members]
      row_I[members] += self.weights[rule] * shares / shares.sum()
    row_I /= row_I.sum()
    row_I.flags.writeable = False
    return row_I

  def _offers(self, last_two: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The item indices that each rule offers; a rule with none is not in it."""
    everything = np.arange(len(self.item_ids))
    if not last_two:
      return {'store': everything}
    last = last_two[-1]
    brand, kind, volume = self._place(last)
    offers = {
        'succession': self._after(brand, kind, volume),
        'companion': self._cell(brand, self._next_kind(brand, kind), volume),
        'return': self._returns(last_two),
        'brand': np.flatnonzero(self.brands == brand),
        'store': everything,
    }
    offers = {rule: members[members != last] for rule, members in offers.items()}
    return {rule: members for rule, members in offers.items() if len(members)}

  def _returns(self, last_two: tuple[int, ...]) -> np.ndarray:
    if len(last_two) == 2:
      brand, kind, volume = self._place(last_two[0])
      if self._place(last_two[1]) == (brand, self._next_kind(brand, kind), volume):
        return self._after(brand, kind, volume)
    return np.empty(0, np.int64)

  def _after(self, brand: int, kind: int, volume: int) -> np.ndarray:
    successors = self._cell(brand, kind, volume + 1)
    return successors if len(successors) else self._cell(brand, self._next_kind(brand, kind), 0)

  def _place(self, item: int) -> tuple[int, int, int]:
    return int(self.brands[item]), int(self.kinds[item]), int(self.volumes[item])

  @functools.cached_property
  def _cells(self) -> dict[tuple[int, int, int], np.ndarray]:
    cells: dict[tuple[int, int, int], list[int]] = {}
    for item in range(len(self.item_ids)):
      cells.setdefault(self._place(item), []).append(item)
    return {place: np.array(members) for place, members in cells.items()}

  def _cell(self, brand: int, kind: int, volume: int) -> np.ndarray:
    return self._cells.get((brand, kind, volume), np.empty(0, np.int64))

  @functools.cached_property
  def _n_kinds(self) -> np.ndarray:
    """int64 [brands]: a brand has the kinds 0 to n - 1; after its last one comes its first."""
    return np.array([self.kinds[self.brands == brand].max() + 1 for brand in range(self.brands.max() + 1)])

  def _next_kind(self, brand: int, kind: int) -> int:
    return int((kind + 1) % self._n_kinds[brand])

  @functools.cached_property
  def _indices(self) -> dict[str, int]:
    return {item_id: index for index, item_id in enumerate(self.item_ids)}

  def _index(self, item_id: str) -> int:
    if item_id not in self._indices:
      raise UserError(f'Item {item_id!r} is not in this category of the generated store; give the store that the data '
                      'set was prepared from.')
    return self._indices[item_id]


def _path(store: str | os.PathLike, category: str) -> pathlib.Path:
  return pathlib.Path(store) / 'oracle' / f'{category}.json'


def save_oracle(store: str | os.PathLike, category: str, oracle: Oracle) -> None:
  """Writes the rules of a category into the store's folder `oracle`."""
  path = _path(store, category)
  path.parent.mkdir(exist_ok=True)
  outputs.write_json(path, {
      'item_ids': list(oracle.item_ids),
      **{name: getattr(oracle, name).tolist() for name in ('brands', 'kinds', 'volumes', 'popularity')},
      'weights': oracle.weights,
  })


def load_oracle(store: str | os.PathLike, category: str) -> Oracle:
  """Reads the rules of a category of a generated store. Raises UserError if they are not there, or broken."""
  path = _path(store, category)
  try:
    saved = json.loads(path.read_bytes())
    return Oracle(tuple(saved['item_ids']),
                  *(np.array(saved[name], np.int64) for name in ('brands', 'kinds', 'volumes')),
                  np.array(saved['popularity'], np.float64), saved['weights'])
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); only a generated store has a ceiling.') from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: does not hold the rules of a generated store ({error!r}); synthesize it anew.') from error
