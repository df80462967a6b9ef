"""The item token table: the tokens of every item's piece, computed once for a data set, a template and a vocabulary.

A history's tokens are a concatenation of prompt pieces and rows of this table. So an item has the same tokens in a
history, alone, and in the catalogue's trie. It is kept beside the data set, in a folder whose name is a hash of what it is a
function of, and mapped into memory from there:

  tokens.npy, offsets.npy   the arrays of `ItemTokens`
  checksums.json            the CRC-32 of each: a damaged table is computed anew
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import tqdm

from calrec_jax import outputs
from calrec_jax.errors import UserError
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate

if TYPE_CHECKING:  # these bring TensorFlow and DuckDB
  from calrec_jax.data.histories import Histories
  from calrec_jax.text.vocabularies import TokenizerVocabulary

FORMAT = 1
_ARRAYS = ('tokens.npy', 'offsets.npy')
_CHECKSUMS = 'checksums.json'
_BATCH = 4096  # texts tokenized at once, on all cores; bounds the memory that their encodings take
_MANY = 200_000  # items of which a log tells that they are being tokenized
_BLOCK_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class ItemTokens:
  """The tokens of I items in one ragged array, which may be mapped from a file: nobody writes to it.

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


def item_tokens(texts: Iterable[str], vocabulary: TokenizerVocabulary) -> ItemTokens:
  """Tokenizes item texts as pieces of a history: each with one space before it, on its own.

  Args:
    texts: I item texts as `ItemTemplate.item_text` writes them, without a leading space.
    vocabulary: anything with `encode_batch`.
  """
  tokens, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
  for some_tokens, some_lengths in _encoded(texts, vocabulary):
    tokens.append(some_tokens)
    lengths.append(some_lengths)
  return ItemTokens(np.concatenate(tokens), np.cumsum(np.concatenate(lengths)))


def _encoded(texts: Iterable[str], vocabulary: TokenizerVocabulary) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(the tokens of `_BATCH` texts one after the other, int32; how many each text has, int64 [texts]), batch by batch."""
  texts = iter(texts)
  while batch := [' ' + text for text in itertools.islice(texts, _BATCH)]:
    pieces = vocabulary.encode_batch(batch)
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    yield np.fromiter(itertools.chain.from_iterable(pieces), np.int32, int(lengths.sum())), lengths


def user_tokens(items: Sequence[np.ndarray], prompts: PromptTokens) -> np.ndarray:
  """The user part in tokens, int32 [.]: each item after its prompt, and the prompt of the next one (method: Text)."""
  parts = [prompts.first]
  for tokens in items:
    parts += [tokens, prompts.next]
  return np.concatenate(parts)


def load_item_tokens(folder: str | os.PathLike, histories: Histories, template: ItemTemplate,
                     vocabulary: TokenizerVocabulary) -> ItemTokens:
  """The table of `histories`, mapped from `folder`/item_tokens if it was computed before, else computed and kept there.

  Its memory is the files' pages, which processes share and the system takes back. Processes that begin at once each compute
  it, and one of them keeps it; where the folder cannot be written, the table is in memory alone.
  """
  key = json.dumps([FORMAT, histories.fingerprint, dataclasses.asdict(template), vocabulary.fingerprint])
  place = pathlib.Path(folder) / 'item_tokens' / hashlib.sha256(key.encode()).hexdigest()[:32]
  if (table := _mapped(place)) is not None:
    return table
  texts = lambda: map(template.item_text, tqdm.tqdm(histories.items, desc='item tokens', unit=' items', delay=1, leave=False,
                                                    mininterval=0.5, file=sys.stderr, disable=None))
  if len(histories.items) >= _MANY:
    logging.info('Tokenizes the %d items of %s, once for this vocabulary.', len(histories.items), histories.name)
  shutil.rmtree(place, ignore_errors=True)  # a damaged one
  reason: Exception | str = 'it is gone again'
  try:
    with outputs.new_folder(place) as scratch:
      _write(scratch, texts(), vocabulary)
  except (OSError, UserError) as error:  # among others: another process has just put it there
    reason = error
  if (table := _mapped(place)) is None:
    logging.warning('The item tokens are kept in memory and not at %s: %s', place, reason)
    table = item_tokens(texts(), vocabulary)
  return table


def _mapped(place: pathlib.Path) -> ItemTokens | None:
  """The table in a folder, as arrays that cannot be written to; None if there is none, or it is damaged."""
  try:
    if json.loads((place / _CHECKSUMS).read_text(encoding='utf-8')) != _checksums(place):
      return None
    return ItemTokens(*(np.load(place / name, mmap_mode='r').view(np.ndarray) for name in _ARRAYS))
  except (OSError, ValueError):
    return None


def _write(folder: pathlib.Path, texts: Iterable[str], vocabulary: TokenizerVocabulary) -> None:
  """Writes a table's files, the tokens as they come: of those a batch is in memory."""
  tokens_file, offsets_file = (folder / name for name in _ARRAYS)
  lengths = [np.zeros(1, np.int64)]
  with tokens_file.open('wb') as file:
    _write_header(file, 0)
    for tokens, some_lengths in _encoded(texts, vocabulary):
      file.write(tokens)
      lengths.append(some_lengths)
    offsets = np.cumsum(np.concatenate(lengths))
    file.seek(0)
    _write_header(file, int(offsets[-1]))
  np.save(offsets_file, offsets)
  outputs.write_json(folder / _CHECKSUMS, _checksums(folder))


def _write_header(file: BinaryIO, n_tokens: int) -> None:
  """The beginning of tokens.npy. The format leaves room in it for the number to grow: it has one length for all."""
  np.lib.format.write_array_header_1_0(file, {
      'descr': np.lib.format.dtype_to_descr(np.dtype(np.int32)), 'fortran_order': False, 'shape': (n_tokens,)})


def _checksums(folder: pathlib.Path) -> dict[str, int]:
  """The CRC-32 of each array's file, which is read block by block."""
  found = {}
  for name in _ARRAYS:
    found[name] = 0
    with (folder / name).open('rb') as file:
      while block := file.read(_BLOCK_BYTES):
        found[name] = zlib.crc32(block, found[name])
  return found


def count_cut_differences(texts: Sequence[str], vocabulary: TokenizerVocabulary) -> int:
  """How many of the texts, written as a history's second item, have other tokens when the whole is tokenized at once.

  0 where no merge crosses a cut; the pieces are the definition all the same.
  """
  whole = vocabulary.encode_batch([f'{NEXT} {text}{NEXT}' for text in texts])
  prompt, table = vocabulary.encode(NEXT), item_tokens(texts, vocabulary)
  return sum(prompt + table.item(i).tolist() + prompt != tokens for i, tokens in enumerate(whole))
