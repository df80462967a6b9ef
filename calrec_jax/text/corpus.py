"""The corpus: all histories of a mixture as item numbers, all item texts as tokens, and the excerpts that rows hold.

An excerpt is a run of one history's items that fits a row: the whole history mostly, its newest items for `targets = last`,
one of several windows for `targets = all`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import seqio

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.text.item_tokens import ItemTokens
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate


@dataclasses.dataclass(frozen=True)
class Source:
  """One data set of a mixture, and the share of excerpts that is drawn from it (relative to the others')."""

  histories: Histories
  item_tokens: ItemTokens
  rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Histories and item tokens of all sources, in flat arrays. Items are numbered over all sources.

  Attributes:
    bank: int32 [T], every piece's tokens: the items', then NEXT's, then BOS (if any) and FIRST's together.
    item_starts, item_lengths: int64 [I], where in the bank an item's tokens are, cut to `max_item_tokens`.
    item_sources: int64 [I], the data set of each.
    text_ids: int64 [I], identity of the item's text over all sources, from 1.
    text_items: int64 [texts + 1], one item of each text.
    opener, next_prompt: (start, length) in the bank.
    bos_length: 1 where a BOS opens each segment, else 0.
    eos: the end-of-item label.
    events: int64, the visible items of all users, in order. offsets: int64 [U + 1].
    user_ids: U names. user_sources: int64 [U].
    rates: float64 [sources].
    cut: counts of what `max_item_tokens` cut.
  """

  bank: np.ndarray
  item_starts: np.ndarray
  item_lengths: np.ndarray
  item_sources: np.ndarray
  text_ids: np.ndarray
  text_items: np.ndarray
  opener: tuple[int, int]
  next_prompt: tuple[int, int]
  bos_length: int
  eos: int
  events: np.ndarray
  offsets: np.ndarray
  user_ids: list[str]
  user_sources: np.ndarray
  rates: np.ndarray
  cut: dict[str, int]


def build_corpus(sources: Sequence[Source], *, template: ItemTemplate, vocabulary: seqio.Vocabulary, split: str,
                 max_item_tokens: int) -> Corpus:
  """Joins the sources. `split` is train, validation or test; the last visible item is a target."""
  texts: dict[str, int] = {}
  text_ids, starts, lengths, banks, events, user_ids, user_sources = [], [], [], [], [], [], []
  counts, n_items, n_tokens = [np.zeros(1, np.int64)], 0, 0
  for number, source in enumerate(sources):
    histories, table = source.histories, source.item_tokens
    text_ids += [texts.setdefault(template.item_text(item), len(texts) + 1) for item in histories.items]
    starts.append(table.offsets[:-1] + n_tokens)
    lengths.append(np.diff(table.offsets))
    banks.append(table.tokens)
    seen = histories.visible(split)
    events.append(histories.events[histories.among_first(seen)] + np.int64(n_items))
    counts.append(seen)
    user_ids += histories.user_ids
    user_sources.append(np.full(len(seen), number))
    n_items += len(histories.items)
    n_tokens += len(table.tokens)
  next_tokens, first_tokens = vocabulary.encode(NEXT), vocabulary.encode(FIRST)
  bos = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
  full_lengths = np.concatenate(lengths)
  text_ids = np.asarray(text_ids, np.int64)
  _, text_items = np.unique(text_ids, return_index=True)
  over = np.maximum(full_lengths - max_item_tokens, 0)
  return Corpus(
      bank=np.concatenate([*banks, next_tokens, bos, first_tokens], dtype=np.int32, casting='unsafe'),
      item_starts=np.concatenate(starts), item_lengths=np.minimum(full_lengths, max_item_tokens),
      item_sources=np.repeat(np.arange(len(sources)), [len(s.histories.items) for s in sources]),
      text_ids=text_ids, text_items=np.concatenate([[0], text_items]),
      opener=(n_tokens + len(next_tokens), len(bos) + len(first_tokens)), next_prompt=(n_tokens, len(next_tokens)),
      bos_length=len(bos), eos=vocabulary.eos_id,
      events=np.concatenate(events), offsets=np.cumsum(np.concatenate(counts)),
      user_ids=user_ids, user_sources=np.concatenate(user_sources), rates=np.asarray([s.rate for s in sources], float),
      cut={'items_cut': int((over > 0).sum()), 'item_tokens_cut': int(over.sum())})


@dataclasses.dataclass(frozen=True)
class Excerpts:
  """Excerpts as parallel arrays, int64 [n]: items `start` to `stop` of the corpus' events, targets from `first_target`.

  `tokens` is what an excerpt takes of a row, `losses` how many of them carry a loss. `log_shares`: float32 [texts + 1], the log
  of the share of all targets, drawn by the sources' rates, that have a text; 0 where none has.
  """

  users: np.ndarray
  starts: np.ndarray
  stops: np.ndarray
  first_targets: np.ndarray
  tokens: np.ndarray
  losses: np.ndarray
  log_shares: np.ndarray
  cut: dict[str, int]

  def __len__(self) -> int:
    return len(self.users)

  @property
  def n_targets(self) -> np.ndarray:
    """How many targets each excerpt has."""
    return self.stops - self.first_targets


def excerpts(corpus: Corpus, *, length: int, targets: str, context_items: int) -> Excerpts:
  """Cuts every history to excerpts of up to `length` tokens.

  `targets = last` keeps the newest whole items, and the last item is the target; `targets = all` cuts windows in which each
  item after the first is a target exactly once: a later window opens with up to `context_items` older items.
  Histories of fewer than two visible items have no target, and are counted. Raises UserError if two items may not fit.
  """
  longest = int(corpus.item_lengths.max(initial=0))
  needed = corpus.opener[1] + corpus.next_prompt[1] + 2 * longest
  if needed > length:
    raise UserError(f'TASK_FEATURE_LENGTHS: a row of {length} tokens cannot hold two items of {longest} tokens with their '
                    f"prompts; give 'inputs' and 'targets' {needed} together, or lower 'targets', which caps an item.")
  step = corpus.item_lengths[corpus.events] + corpus.next_prompt[1]
  ends = np.concatenate([[0], np.cumsum(step)])  # an excerpt [a, b) takes ends[b] - ends[a] + base tokens
  base = corpus.opener[1] - corpus.next_prompt[1]
  sizes = np.diff(corpus.offsets)
  users = np.flatnonzero(sizes >= 2)
  lows, highs = corpus.offsets[:-1][users], corpus.offsets[1:][users]
  cut = {'histories': len(sizes), 'histories_without_target': len(sizes) - len(users)}
  if targets == 'last':
    starts = np.maximum(lows, np.searchsorted(ends, ends[highs] + base - length))
    stops, first_targets = highs, highs - 1
    cut |= {'histories_cut': int((starts > lows).sum()), 'context_items_cut': int((starts - lows).sum())}
  else:
    users, starts, stops, first_targets = _windows(users, lows, highs, ends, length - base, context_items)
    cut |= {'histories_cut': int((np.unique(users, return_counts=True)[1] > 1).sum()), 'windows': len(users)}
  loss_ends = np.concatenate([[0], np.cumsum(corpus.item_lengths[corpus.events] + 1)])  # its tokens and its end
  return Excerpts(users, starts, stops, first_targets, ends[stops] - ends[starts] + base,
                  loss_ends[stops] - loss_ends[first_targets], _log_shares(corpus, users, first_targets, stops), cut)


def ranks(counts: np.ndarray) -> np.ndarray:
  """0 1 2 0 1 … for counts [3, 2, …]."""
  return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """The indices start, start + 1, … of every run, one run after the other."""
  return np.repeat(starts, lengths) + ranks(lengths)


def _log_shares(corpus: Corpus, users: np.ndarray, first_targets: np.ndarray, stops: np.ndarray) -> np.ndarray:
  sources, counts = corpus.user_sources[users], stops - first_targets
  drawn = (corpus.rates / np.maximum(np.bincount(sources, minlength=len(corpus.rates)), 1))[sources]  # of each excerpt
  targets = corpus.events[spread(first_targets, counts)]
  weights = np.bincount(corpus.text_ids[targets], np.repeat(drawn, counts), len(corpus.text_items))
  return np.log(weights / max(weights.sum(), 1e-9), out=np.zeros(len(weights)), where=weights > 0).astype(np.float32)


def _windows(users: np.ndarray, lows: np.ndarray, highs: np.ndarray, ends: np.ndarray, room: int,
             context_items: int) -> tuple[np.ndarray, ...]:
  """(users, starts, stops, first targets) of the windows of `targets = all`, in the order of the users."""
  rows = []
  whole = ends[highs] - ends[lows] <= room
  for user, low, high, fits in zip(users.tolist(), lows.tolist(), highs.tolist(), whole.tolist(), strict=True):
    start, target = low, low + 1
    while not fits:
      stop = min(high, int(np.searchsorted(ends, ends[start] + room, side='right')) - 1)
      rows.append((user, start, stop, target))
      if stop == high:
        break
      # The next window must hold its first target, the item at `stop`.
      start, target = max(stop - context_items, int(np.searchsorted(ends, ends[stop + 1] - room))), stop
      start = min(start, stop - 1)
    if fits:
      rows.append((user, start, high, target))
  return tuple(np.asarray(column, np.int64) for column in zip(*rows, strict=True)) if rows else (np.zeros(0, np.int64),) * 4
