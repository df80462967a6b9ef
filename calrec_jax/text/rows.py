"""Rows: excerpts written out as the arrays of a batch (design: Rows).

A batch of B rows, by example: two histories packed in one row of L = 16, `targets = all`, the vocabulary without BOS; 2 is
FIRST, 3 is NEXT, 1 is EOS, the items are [7 8], [9], [7 8] and [5 6], [9]:

  tokens         [2 7 8 3 9 3 7 8 2 5 6 3 9 0 0 0]   int32, what is read
  labels         [7 8 1 9 1 7 8 1 5 6 1 9 1 0 0 0]   int32, what is predicted: the item ends (1) where the next prompt is read
  segments       [1 1 1 1 1 1 1 1 2 2 2 2 2 0 0 0]   int32, the packed history; 0 is padding
  positions      [0 1 2 3 4 5 6 7 0 1 2 3 4 0 0 0]   int32, restarts with each history
  items          [0 1 1 0 2 0 3 3 0 1 1 0 2 0 0 0]   int32, k = text of the history's k-th item; 0 = no item's text
  loss_weights   [0 0 0 1 1 1 1 1 0 0 0 1 1 0 0 0]   float32, 1 where a target's token or end is predicted
  alone_tokens   [7 8 9 0]  alone_segments [1 1 2 0]  alone_positions [0 1 0 0]   int32 [M], each text once in the batch
  slot_texts     [31 32]                              int32 [S], the text of each alone segment of the row; 0 is an empty slot
  span_segments  [1 1 2]                              int32 [E], one span a target: its segment,
  span_items     [2 3 2]                                its item number,
  span_slots     [1 0 1]                                its slot, counted over all rows of the batch (row · S + segment − 1),
  span_texts     [32 31 32]                             its text; 0 is an empty span;
  span_log_shares [-0.405 -1.099 -0.405]                and the log of the share of all targets that have this text: float32
"""

import dataclasses

import numpy as np

from calrec_jax.text.corpus import Corpus, Excerpts, ranks, spread


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Sizes of a batch: B rows of L joint and M alone positions, with E spans and S alone slots a row."""

  B: int
  L: int
  M: int
  E: int
  S: int

  @property
  def positions(self) -> int:
    """Of the whole batch, joint and alone."""
    return self.B * (self.L + self.M)

  def features(self) -> dict[str, tuple[tuple[int, ...], type]]:
    """Name to (shape, dtype) of every array of a batch."""
    joint, alone, span = (self.B, self.L), (self.B, self.M), (self.B, self.E)
    return {
        'tokens': (joint, np.int32), 'labels': (joint, np.int32), 'segments': (joint, np.int32),
        'positions': (joint, np.int32), 'items': (joint, np.int32), 'loss_weights': (joint, np.float32),
        'alone_tokens': (alone, np.int32), 'alone_segments': (alone, np.int32), 'alone_positions': (alone, np.int32),
        'slot_texts': ((self.B, self.S), np.int32),
        'span_segments': (span, np.int32), 'span_items': (span, np.int32), 'span_slots': (span, np.int32),
        'span_texts': (span, np.int32), 'span_log_shares': (span, np.float32)}


@dataclasses.dataclass(frozen=True)
class BatchLayout:
  """Which excerpts each of a batch's rows holds, and which texts each alone row: lists of B int arrays."""

  rows: list[np.ndarray]
  alone_rows: list[np.ndarray]


def target_texts(corpus: Corpus, excerpts: Excerpts, chosen: np.ndarray) -> np.ndarray:
  """Text ids of all targets of the chosen excerpts, in order."""
  first, stop = excerpts.first_targets[chosen], excerpts.stops[chosen]
  return corpus.text_ids[corpus.events[spread(first, stop - first)]]


def build_rows(corpus: Corpus, excerpts: Excerpts, layout: BatchLayout, shapes: Shapes,
               rows: slice = slice(None)) -> dict[str, np.ndarray]:
  """The arrays of a batch, or of the rows `rows` of it (a process builds only its own)."""
  batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in
           dataclasses.replace(shapes, B=len(layout.rows[rows])).features().items()}
  slots = np.concatenate([row * shapes.S + np.arange(len(texts)) for row, texts in enumerate(layout.alone_rows)])
  texts = np.concatenate(layout.alone_rows)
  by_text = np.argsort(texts)
  _write_joint(batch, corpus, excerpts, layout.rows[rows], texts[by_text], slots[by_text])
  _write_alone(batch, corpus, layout.alone_rows[rows])
  return batch


def build_alone_rows(corpus: Corpus, alone_rows: list[np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
  """The alone part of a batch by itself: rows of texts."""
  features = dataclasses.replace(shapes, B=len(alone_rows)).features()
  batch = {name: np.zeros(*features[name]) for name in ('alone_tokens', 'alone_segments', 'alone_positions', 'slot_texts')}
  _write_alone(batch, corpus, alone_rows)
  return batch


def _write_joint(batch: dict[str, np.ndarray], corpus: Corpus, excerpts: Excerpts, rows: list[np.ndarray],
                 texts: np.ndarray, slots: np.ndarray) -> None:
  per_row = np.asarray([len(row) for row in rows])
  chosen = np.concatenate(rows).astype(np.int64)
  if not len(chosen):
    return
  n_items = excerpts.stops[chosen] - excerpts.starts[chosen]
  # One entry an item of an excerpt.
  event = spread(excerpts.starts[chosen], n_items)
  item, rank = corpus.events[event], ranks(n_items)
  of = np.repeat(np.arange(len(chosen)), n_items)
  number = event - corpus.offsets[excerpts.users[chosen]][of] + 1
  is_target = event >= excerpts.first_targets[chosen][of]
  # Two pieces an item: the prompt before it, then its text.
  prompt = np.where(rank[:, None] == 0, corpus.opener, corpus.next_prompt)
  starts = np.stack([prompt[:, 0], corpus.item_starts[item]], axis=1).reshape(-1)
  lengths = np.stack([prompt[:, 1], corpus.item_lengths[item]], axis=1).reshape(-1)
  tokens = corpus.bank[spread(starts, lengths)]
  piece = np.repeat(np.arange(len(lengths)), lengths)
  is_text = piece % 2 == 1
  last = np.cumsum(lengths) - 1  # of each piece
  labels = np.append(tokens[1:], 0)
  labels[last[1::2]] = corpus.eos
  weights = is_text & is_target[piece // 2]
  weights[last[0::2][is_target]] = True
  # Where it all goes: rows are filled from the left, excerpt by excerpt.
  excerpt_tokens = excerpts.tokens[chosen]
  row = np.repeat(np.repeat(np.arange(len(rows)), per_row), excerpt_tokens)
  column = ranks(np.bincount(row, minlength=len(rows)))
  batch['tokens'][row, column] = tokens
  batch['labels'][row, column] = labels
  batch['segments'][row, column] = np.repeat(ranks(per_row) + 1, excerpt_tokens)
  batch['positions'][row, column] = ranks(excerpt_tokens)
  batch['items'][row, column] = np.where(is_text, number[piece // 2], 0)
  batch['loss_weights'][row, column] = weights
  # The span table: one span a target.
  target_of = of[is_target]
  span_row = np.repeat(np.arange(len(rows)), per_row)[target_of]
  span = ranks(np.bincount(span_row, minlength=len(rows)))
  text = corpus.text_ids[item[is_target]]
  batch['span_segments'][span_row, span] = (ranks(per_row) + 1)[target_of]
  batch['span_items'][span_row, span] = number[is_target]
  batch['span_slots'][span_row, span] = slots[np.searchsorted(texts, text)]
  batch['span_texts'][span_row, span] = text
  batch['span_log_shares'][span_row, span] = excerpts.log_shares[text]


def _write_alone(batch: dict[str, np.ndarray], corpus: Corpus, alone_rows: list[np.ndarray]) -> None:
  per_row = np.asarray([len(row) for row in alone_rows])
  text = np.concatenate(alone_rows).astype(np.int64)
  if not len(text):
    return
  item = corpus.text_items[text]
  pieces = [corpus.item_starts[item]], [corpus.item_lengths[item]]
  if corpus.bos_length:
    pieces[0].insert(0, np.full(len(text), corpus.opener[0]))
    pieces[1].insert(0, np.ones(len(text), np.int64))
  lengths = np.stack(pieces[1], axis=1)
  tokens = corpus.bank[spread(np.stack(pieces[0], axis=1).reshape(-1), lengths.reshape(-1))]
  segment_tokens = lengths.sum(axis=1)
  row = np.repeat(np.repeat(np.arange(len(alone_rows)), per_row), segment_tokens)
  column = ranks(np.bincount(row, minlength=len(alone_rows)))
  batch['alone_tokens'][row, column] = tokens
  batch['alone_segments'][row, column] = np.repeat(ranks(per_row) + 1, segment_tokens)
  batch['alone_positions'][row, column] = ranks(segment_tokens)
  batch['slot_texts'][np.repeat(np.arange(len(alone_rows)), per_row), ranks(per_row)] = text
