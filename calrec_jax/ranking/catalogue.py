"""The catalogue: what can be recommended, each item with its text."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from calrec_jax.text.templates import ItemTemplate

if TYPE_CHECKING:
  from calrec_jax.data.histories import Histories


@dataclasses.dataclass(frozen=True)
class Catalogue:
  """Items and their texts, side by side.

  Attributes:
    item_ids: I ids, each once.
    texts: I texts, without a leading space. Different items may have one text: no ranker of texts can tell them apart.
  """

  item_ids: Sequence[str]
  texts: Sequence[str]

  def __post_init__(self):
    if len(self.item_ids) != len(self.texts):
      raise ValueError(f'{len(self.item_ids)} item ids, but {len(self.texts)} texts.')

  def __len__(self) -> int:
    return len(self.item_ids)

  @functools.cached_property
  def text_ids_I(self) -> np.ndarray:
    """int32 [I]: items have the same number if, and only if, they have the same text; numbers in catalogue order."""
    number_of = {}
    return np.array([number_of.setdefault(text, len(number_of)) for text in self.texts], np.int32)

  @functools.cached_property
  def twins_I(self) -> np.ndarray:
    """int64 [I]: how many other items have the item's text."""
    return np.bincount(self.text_ids_I)[self.text_ids_I] - 1 if len(self) else np.zeros(0, np.int64)


def indexed_texts(items: Sequence[Mapping[str, str]], template: ItemTemplate, fields: Sequence[str] | None) -> list[str]:
  """What BM25 indexes of each item: its text, with these fields in the place of the template's, if any are given."""
  template = template if fields is None else dataclasses.replace(template, fields=tuple(fields))
  return [template.item_text(item) for item in items]


def from_histories(histories: 'Histories', template: ItemTemplate) -> Catalogue:
  """The catalogue of a data set, in the order of its items file."""
  return Catalogue(histories.item_ids, [template.item_text(item) for item in histories.items])
