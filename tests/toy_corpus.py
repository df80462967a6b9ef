"""Small corpora for tests: items are given as their tokens, histories as item numbers."""

import types
from collections.abc import Sequence

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.text.corpus import Corpus, Source, build_corpus
from calrec_jax.text.item_tokens import ItemTokens
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate


def toy_vocabulary(first: Sequence[int] = (2,), following: Sequence[int] = (3,), bos: int | None = None, eos: int = 1):
  """A vocabulary that knows the two prompts only."""
  prompts = {FIRST: list(first), NEXT: list(following)}
  return types.SimpleNamespace(encode=prompts.__getitem__, bos_id=bos, eos_id=eos)


def toy_source(items: Sequence[Sequence[int]], histories: Sequence[Sequence[int]], *, name: str = 'toy',
               rate: float = 1.0) -> Source:
  """A data set in which items of equal tokens have equal texts."""
  fields = [{'title': str(list(tokens)), 'category': '', 'brand': '', 'price': ''} for tokens in items]
  data = Histories(
      name, [f'{name}{user}' for user in range(len(histories))], [f'{name}_{item}' for item in range(len(items))],
      fields, np.cumsum([0, *map(len, histories)]), np.asarray([e for h in histories for e in h], np.int32))
  table = ItemTokens(np.asarray([t for tokens in items for t in tokens], np.int32), np.cumsum([0, *map(len, items)]))
  return Source(data, table, rate)


def toy_corpus(items: Sequence[Sequence[int]], histories: Sequence[Sequence[int]], *, max_item_tokens: int = 99,
               split: str = 'test', **vocabulary) -> Corpus:
  """The corpus of one data set; by default every event is visible. `vocabulary`: see `toy_vocabulary`."""
  return build_corpus([toy_source(items, histories)], template=ItemTemplate(), split=split,
                      vocabulary=toy_vocabulary(**vocabulary), max_item_tokens=max_item_tokens)


def random_corpus(seed: int, *, users: int, items: int = 30, longest_item: int = 5, lengths: tuple[int, int] = (2, 9),
                  vocab_size: int = 40, **kwargs) -> Corpus:
  """Random items of 1 to `longest_item` tokens (ids 5 and up), random histories; one item's text is another's too."""
  rng = np.random.default_rng(seed)
  texts = [rng.integers(5, vocab_size, rng.integers(1, longest_item + 1)).tolist() for _ in range(items)]
  texts[-1] = texts[0]
  histories = [rng.integers(0, items, rng.integers(*lengths)).tolist() for _ in range(users)]
  return toy_corpus(texts, histories, **kwargs)
