"""The item token table: the tokens of every item's piece, computed once for a data set, a template and a vocabulary.

A history's tokens are a concatenation of prompt pieces and rows of this table. So an item has the same tokens in a
history, alone, and in the catalogue's trie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from calrec_jax import outputs
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate

if TYPE_CHECKING:  # these bring TensorFlow and DuckDB
  from calrec_jax.data.histories import Histories
  from calrec_jax.text.vocabularies import TokenizerVocabulary

FORMAT = 1
_BATCH = 100_000  # texts tokenized at once; bounds the memory that the encodings take


@dataclasses.dataclass(frozen=True)
class ItemTokens:
  """The tokens of I items in one ragged array.

  Attributes:
    tokens: int32 [T], the items' pieces one after the other, without BOS or EOS.
    offsets: int64 [I + 1]; item i has tokens[offsets[i]:offsets[i + 1]].
  """

  tokens: np.ndarray
  offsets: np.ndarray

  def item(self, index: int) -> np.ndarray:
    """Item `index`'s tokens: int32 [its length], a view."""
    return self.tokens[self.offsets[index]:self.offsets[index + 1]]


@dataclasses.dataclass(frozen=True)
class PromptTokens:
  """The tokens of the two prompt pieces.

  Attributes:
    first: int32 [P1], those of `templates.FIRST`.
    next: int32 [P2], those of `templates.NEXT`.
  """

  first: np.ndarray
  next: np.ndarray


def prompt_tokens(vocabulary: TokenizerVocabulary) -> PromptTokens:
  """The prompt pieces' tokens, without BOS."""
  return PromptTokens(*(np.array(ids, np.int32) for ids in vocabulary.encode_batch([FIRST, NEXT])))


def item_tokens(texts: Sequence[str], vocabulary: TokenizerVocabulary) -> ItemTokens:
  """Tokenizes item texts as pieces of a history: each with one space before it, on its own.

  Args:
    texts: I item texts as `ItemTemplate.item_text` writes them, without a leading space.
    vocabulary: anything with `encode_batch`.
  """
  tokens, lengths = [], [0]
  for start in range(0, len(texts), _BATCH):
    pieces = vocabulary.encode_batch([' ' + text for text in texts[start:start + _BATCH]])
    lengths += map(len, pieces)
    tokens.append(np.fromiter((token for piece in pieces for token in piece), np.int32))
  return ItemTokens(np.concatenate([np.zeros(0, np.int32), *tokens]), np.cumsum(lengths, dtype=np.int64))


def user_tokens(items: Sequence[np.ndarray], prompts: PromptTokens) -> np.ndarray:
  """The user part in tokens, int32 [.]: each item after its prompt, and the prompt of the next one (method: Text)."""
  parts = [prompts.first]
  for tokens in items:
    parts += [tokens, prompts.next]
  return np.concatenate(parts)


def load_item_tokens(folder: str | os.PathLike, histories: Histories, template: ItemTemplate,
                     vocabulary: TokenizerVocabulary) -> ItemTokens:
  """The table of `histories`, read from `folder`/item_tokens if it was computed before, else computed and kept there.

  The file's name is a hash of what the table is a function of (data, template, vocabulary). A damaged file is computed
  anew; where the folder cannot be written, nothing is kept.
  """
  key = json.dumps([FORMAT, histories.fingerprint, dataclasses.asdict(template), vocabulary.fingerprint])
  path = pathlib.Path(folder) / 'item_tokens' / f'{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz'
  try:
    with np.load(path) as stored:
      return ItemTokens(stored['tokens'], stored['offsets'])
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
    pass
  table = item_tokens([template.item_text(item) for item in histories.items], vocabulary)
  try:
    with outputs.new_file(path) as scratch, scratch.open('wb') as file:
      np.savez_compressed(file, tokens=table.tokens, offsets=table.offsets)
  except OSError:
    pass
  return table


def count_cut_differences(texts: Sequence[str], vocabulary: TokenizerVocabulary) -> int:
  """How many of the texts, written as a history's second item, have other tokens when the whole is tokenized at once.

  0 where no merge crosses a cut; the pieces are the definition all the same.
  """
  whole = vocabulary.encode_batch([f'{NEXT} {text}{NEXT}' for text in texts])
  prompt, table = vocabulary.encode(NEXT), item_tokens(texts, vocabulary)
  return sum(prompt + table.item(i).tolist() + prompt != tokens for i, tokens in enumerate(whole))
