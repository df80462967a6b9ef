"""Prefixes: what the model reads before it writes a user's next item (method: Text)."""

import dataclasses

import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.text.item_tokens import ItemTokens, PromptTokens, prompt_tokens, user_tokens
from calrec_jax.text.vocabularies import TokenizerVocabulary


@dataclasses.dataclass(frozen=True)
class Prefixes:
  """Makes prefixes: FIRST item NEXT item … NEXT, the same pieces as in training, with BOS before them if there is one.

  With BOS 9, FIRST [2], NEXT [3] and the items [7 8] and [5], the prefix of both is [9 2 7 8 3 5 3].

  Attributes:
    bos: int32 [1], or [0] where the vocabulary has none.
    prompts: the prompt pieces.
    item_tokens: the catalogue.
    max_item_tokens: an item's tokens after these are left out.
    max_length: tokens; a longer history keeps its newest whole items.
  """

  bos: np.ndarray
  prompts: PromptTokens
  item_tokens: ItemTokens
  max_item_tokens: int
  max_length: int

  def newest(self, items: np.ndarray) -> tuple[np.ndarray, int]:
    """(the newest of `items` that fit, the length of their prefix)."""
    offsets, opener = self.item_tokens.offsets, len(self.bos) + len(self.prompts.first)
    lengths = np.minimum(offsets[items + 1] - offsets[items], self.max_item_tokens) + len(self.prompts.next)
    newest_first = np.cumsum(np.append(opener, lengths[::-1]))
    n_kept = int(np.searchsorted(newest_first, self.max_length, side='right')) - 1
    return items[len(items) - n_kept:], int(newest_first[n_kept])

  def tokens(self, items: np.ndarray) -> np.ndarray:
    """The prefix of exactly these items, at least one: int32."""
    pieces = [self.item_tokens.item(item)[:self.max_item_tokens] for item in items]
    return np.concatenate([self.bos, user_tokens(pieces, self.prompts)]).astype(np.int32)


def make_prefixes(vocabulary: TokenizerVocabulary, item_tokens: ItemTokens, *, max_item_tokens: int,
                  max_length: int) -> Prefixes:
  """Raises UserError where a prefix cannot hold the catalogue's longest item."""
  bos = np.asarray([] if vocabulary.bos_id is None else [vocabulary.bos_id], np.int32)
  prompts = prompt_tokens(vocabulary)
  longest = min(int(np.diff(item_tokens.offsets).max(initial=0)), max_item_tokens)
  needed = len(bos) + len(prompts.first) + longest + len(prompts.next)
  if needed > max_length:
    raise UserError(f'max_prefix_length = {max_length}: an item of {longest} tokens and its prompts need {needed}; '
                    'give so much, or lower max_item_tokens.')
  return Prefixes(bos, prompts, item_tokens, max_item_tokens, max_length)


def form_batches(lengths_U: np.ndarray, *, users_per_batch: int, bucket: int) -> list[tuple[np.ndarray, int]]:
  """Groups users of similar prefix length.

  Args:
    lengths_U: each prefix's length, tokens.
    users_per_batch: the most users of a batch; a bucket's last batch may have fewer.
    bucket: lengths are padded to multiples of this, so that there are few shapes to compile.

  Returns:
    (indices into `lengths_U`, padded length) of each batch. The longest are first, so what does not fit into memory
    fails at once; within a bucket users keep their order.
  """
  padded_U = -(-lengths_U // bucket) * bucket
  batches = []
  for length in np.unique(padded_U)[::-1]:
    users = np.flatnonzero(padded_U == length)
    batches += [(users[start:start + users_per_batch], int(length)) for start in range(0, len(users), users_per_batch)]
  return batches
