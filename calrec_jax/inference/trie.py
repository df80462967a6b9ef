"""The trie of a catalogue: which tokens may follow, so that what is written is an item's text.

A text is a distinct token sequence, cut to `max_item_tokens`; items with equal ones share a text, and are tied. Texts are
numbered in the order of their token sequences, a sequence that begins another one before it. So the texts below a node are a
range of numbers, and a filter of texts says by two of its running sums whether anything is allowed below a node.

Axes: I items, T texts, L tokens of the longest and its end, N nodes, E = N - 1 edges, D depths (the root's is 0).
"""

import dataclasses
import os

import numpy as np

from calrec_jax import outputs
from calrec_jax.text.item_tokens import ItemTokens

_SCALARS = ('eos_id', 'fanouts_D', 'nodes_D')


@dataclasses.dataclass(frozen=True)
class Trie:
  """Nodes are numbered breadth first, in the order of their texts: edge e leads to node e + 1, node 0 is the root.

  The end of a text is a child too, the first one, and has no children; all other nodes have some.

  Attributes:
    starts_N1: int32 [N + 1]; node n's edges are starts[n] to starts[n + 1].
    tokens_E: int32, the token of each edge, in order within a node; the end's is `eos_id`.
    lows_N: int32, the first text below each node.
    highs_N: int32, the text after the last one below it.
    texts_I: int32, the text of each item.
    lengths_T: int32, tokens of each text, without its end.
    fanouts_D: the most children of a node at each depth.
    nodes_D: the number of nodes at each depth.
    eos_id: the end.
  """

  starts_N1: np.ndarray
  tokens_E: np.ndarray
  lows_N: np.ndarray
  highs_N: np.ndarray
  texts_I: np.ndarray
  lengths_T: np.ndarray
  fanouts_D: tuple[int, ...]
  nodes_D: tuple[int, ...]
  eos_id: int

  @property
  def n_texts(self) -> int:
    """T."""
    return len(self.lengths_T)

  def text_tokens(self, texts: np.ndarray) -> np.ndarray:
    """The tokens of some texts, int32 [*texts.shape, longest of them]; what follows a text's last token is `eos_id`."""
    texts = np.asarray(texts)
    longest = int(self.lengths_T[texts].max(initial=0))
    firsts_D = np.cumsum([0, *self.nodes_D])
    found = np.full((*texts.shape, longest), self.eos_id, np.int32)
    for place in range(longest):
      first, after = firsts_D[place + 1:place + 3]
      nodes = first - 1 + np.searchsorted(self.lows_N[first:after], texts, side='right')
      found[..., place] = np.where(self.lengths_T[texts] > place, self.tokens_E[nodes - 1], self.eos_id)
    return found

  def save(self, path: str | os.PathLike) -> None:
    """Writes it all to one .npz, whole or not at all."""
    with outputs.new_file(path) as scratch, scratch.open('wb') as file:
      np.savez(file, **dataclasses.asdict(self))

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Trie':
    """Reads what `save` wrote. Raises what `np.load` does for a damaged file, and KeyError for one of something else."""
    with np.load(path, allow_pickle=False) as stored:
      arrays = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
    plain = {name: arrays[name].tolist() for name in _SCALARS}
    return cls(**arrays | plain | {name: tuple(plain[name]) for name in ('fanouts_D', 'nodes_D')})


def build_trie(item_tokens: ItemTokens, *, max_item_tokens: int, eos_id: int) -> Trie:
  """The trie of a catalogue; it does not depend on the items' order, but for `texts_I`.

  Args:
    item_tokens: the catalogue's, at least one item.
    max_item_tokens: an item's tokens after these are left out.
    eos_id: the end, which no item contains.

  Raises:
    ValueError: no items, an item without tokens or with the end among them, or `max_item_tokens` below 1.
  """
  if max_item_tokens < 1:
    raise ValueError(f'max_item_tokens = {max_item_tokens}; give at least 1.')
  rows_IL, lengths_I = _padded(item_tokens, max_item_tokens, eos_id)
  (n_items, longest), dtype = rows_IL.shape, rows_IL.dtype
  order_I = np.argsort(rows_IL.view(f'S{longest * dtype.itemsize}')[:, 0], kind='stable')
  rows_IL = rows_IL[order_I]
  differs_IL = np.ones((n_items, longest), bool)
  np.not_equal(rows_IL[1:], rows_IL[:-1], out=differs_IL[1:])
  new_I = differs_IL.any(axis=1)
  texts_I = np.empty(n_items, np.int32)
  texts_I[order_I] = np.cumsum(new_I) - 1
  shared_T = differs_IL[new_I].argmax(axis=1)  # how many tokens a text begins with that the text before it has too
  return _link(rows_IL[new_I], lengths_I[order_I][new_I], shared_T, texts_I, eos_id)


def _padded(item_tokens: ItemTokens, max_item_tokens: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Items in rows [I, L], and their lengths: bytes in the order of texts. A token is one higher, as 0 is the end."""
  lengths_I = np.minimum(np.diff(item_tokens.offsets), max_item_tokens).astype(np.int32)
  if not len(lengths_I):
    raise ValueError('The catalogue has no items.')
  if not lengths_I.all():
    raise ValueError(f'Item {np.argmin(lengths_I)} has no tokens; every item needs a text.')
  dtype = '>u2' if item_tokens.tokens.max() < 2**16 - 1 else '>u4'
  rows_IL = np.zeros((len(lengths_I), int(lengths_I.max()) + 1), dtype)
  for place in range(rows_IL.shape[1] - 1):
    longer = np.flatnonzero(lengths_I > place)
    rows_IL[longer, place] = item_tokens.tokens[item_tokens.offsets[longer] + place] + 1
  bad = np.flatnonzero((rows_IL == eos_id + 1).any(axis=1))
  if len(bad):
    raise ValueError(f'Item {bad[0]} has the end, token {eos_id}, in its text.')
  return rows_IL, lengths_I


def _link(rows_TL: np.ndarray, lengths_T: np.ndarray, shared_T: np.ndarray, texts_I: np.ndarray, eos_id: int) -> Trie:
  """The nodes of sorted texts, depth by depth: a text has nodes of its own from its first token on that is not shared."""
  n_texts, longest = rows_TL.shape
  lows, highs, tokens, counts = [np.zeros(1, np.int32)], [np.asarray([n_texts], np.int32)], [], []
  for place in range(longest):
    first_T = np.flatnonzero(shared_T <= place)  # of the texts that have the same up to here
    after_T = np.append(first_T[1:], n_texts)
    reached = lengths_T[first_T] >= place
    first_T, after_T = first_T[reached], after_T[reached]
    parents = np.searchsorted(lows[-1], first_T, side='right') - 1
    counts.append(np.bincount(parents, minlength=len(lows[-1])))
    tokens.append(rows_TL[first_T, place].astype(np.int32) - 1)
    lows.append(first_T.astype(np.int32))
    highs.append(after_T.astype(np.int32))
  counts.append(np.zeros(len(lows[-1]), np.int64))
  starts_N1 = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
  tokens_E = np.concatenate(tokens)
  tokens_E[tokens_E < 0] = eos_id
  return Trie(starts_N1, tokens_E, np.concatenate(lows), np.concatenate(highs), texts_I, lengths_T,
              tuple(int(count.max()) for count in counts), tuple(map(len, lows)), int(eos_id))
