"""The plan of batches: which excerpts make up step s, as a function of (data, seed, s) alone.

Excerpts stream from each source in one seeded permutation after the other; a *window* is a fixed number of tokens of these
streams, shared out by the sources' rates, and makes a fixed number of steps: so any step can be sought without planning those
before it, and any process can build its own rows of it. Within a window excerpts are packed as full as they allow, and the rows
are dealt to steps so that every step has about the same number of target texts, each of which is encoded alone once a step.
"""

import dataclasses
import functools
import heapq
import logging
import math

import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.text.corpus import Corpus, Excerpts, excerpts
from calrec_jax.text.packing import fill_rows
from calrec_jax.text.rows import BatchLayout, Shapes, build_alone_rows, build_rows, target_texts

SLACK = 0.01  # of a window's rows are left free, so that a window that packs a little worse still fits
PROBES = 3  # windows that are packed to choose the shapes
ATTEMPTS = 8  # other orders that are tried where a window does not fit


@dataclasses.dataclass(frozen=True)
class RowOptions:
  """How histories become rows.

  Attributes:
    targets: `last` (one target a history) or `all` (each item after the first).
    context_items: how many older items open a later window of a history that is too long for one (`targets = all`).
    row_length: tokens of a row; None: of the longest history (`TASK_FEATURE_LENGTHS` together). Twice that packs fuller where
      many histories take more than half of it; a batch then has half as many rows for the same tokens.
    alone_length, spans_per_row, alone_slots: sizes M, E and S of the batch; None: chosen from the data.
    window_steps: steps that are planned together.
  """

  targets: str = 'all'
  context_items: int = 4
  row_length: int | None = None
  alone_length: int | None = None
  spans_per_row: int | None = None
  alone_slots: int | None = None
  window_steps: int = 64

  def __post_init__(self):
    if self.targets not in ('last', 'all'):
      raise UserError(f"rows.targets = {self.targets!r}: choose 'last' or 'all'.")

  def tokens(self, longest: int) -> int:
    """Of a row, where the longest history has `longest`."""
    if self.row_length is not None and self.row_length < longest:
      raise UserError(f"rows.row_length = {self.row_length}: a history has up to {longest} tokens (TASK_FEATURE_LENGTHS' "
                      "'inputs' and 'targets' together); raise it to that or more, or leave it out.")
    return self.row_length or longest


def _round_up(n: float, multiple: int = 8) -> int:
  return max(multiple, math.ceil(n / multiple) * multiple)


def _pack(cut: Excerpts, chosen: np.ndarray, limits: tuple[int, int], rng: np.random.Generator | None) -> list[np.ndarray]:
  """Rows of excerpts within (tokens, spans)."""
  sizes = np.stack([cut.tokens[chosen], cut.n_targets[chosen]], axis=1)
  return [chosen[row] for row in fill_rows(sizes, np.asarray(limits), rng)]


def _text_lengths(corpus: Corpus, texts: np.ndarray) -> np.ndarray:
  """Tokens of texts that are read alone."""
  return corpus.item_lengths[corpus.text_items[texts]] + corpus.bos_length


def _pack_texts(corpus: Corpus, texts: np.ndarray, alone_length: int, alone_slots: int) -> list[np.ndarray]:
  """Alone rows of distinct texts."""
  lengths = _text_lengths(corpus, texts)
  sizes = np.stack([lengths, np.ones_like(lengths)], axis=1)
  return [texts[row] for row in fill_rows(sizes, np.asarray([alone_length, alone_slots]))]


def _distinct_texts(corpus: Corpus, cut: Excerpts, rows: list[np.ndarray]) -> np.ndarray:
  return np.unique(target_texts(corpus, cut, np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64)))


def _alone_size(corpus: Corpus, steps: list[list[np.ndarray]], cut: Excerpts, n_rows: int, alone_length: int | None,
                alone_slots: int | None) -> tuple[int, int]:
  """(M, S): the smallest multiples of 8 with which the texts of each step fit `n_rows` alone rows."""
  texts = [_distinct_texts(corpus, cut, step) for step in steps]
  lengths = [_text_lengths(corpus, t) for t in texts]
  longest = int(corpus.item_lengths[corpus.events].max(initial=1)) + corpus.bos_length  # of all steps to come
  if alone_length and alone_length < longest:
    raise UserError(f"rows.alone_length = {alone_length}: an item's text has {longest} tokens; raise it, or lower "
                    "TASK_FEATURE_LENGTHS' 'targets', which caps an item.")
  M = alone_length or _round_up(max([longest, *(tokens.sum() / n_rows for tokens in lengths)]))
  while True:
    packed = [_pack_texts(corpus, t, M, alone_slots or M) for t in texts]
    if alone_length or max(map(len, packed), default=0) <= n_rows:
      return M, alone_slots or _round_up(max((len(row) for rows in packed for row in rows), default=1), 4)
    M += 8


class Stream:
  """The endless stream of one source's excerpts: a seeded permutation of all of them, then another."""

  def __init__(self, cut: Excerpts, members: np.ndarray, seed: tuple[int, ...]):
    self.members, self.seed, self.tokens = members, seed, cut.tokens
    self.total = int(cut.tokens[members].sum())  # tokens of an epoch
    self._epoch = functools.lru_cache(maxsize=4)(self._shuffled)

  def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng((*self.seed, epoch)).permutation(self.members)
    return order, np.cumsum(self.tokens[order])

  def take(self, start: int, stop: int) -> np.ndarray:
    """The excerpts that end at stream positions (start, stop], counted in tokens."""
    parts = [self.members[:0]]
    for epoch in range(start // self.total, (stop - 1) // self.total + 1):
      order, ends = self._epoch(epoch)
      low, high = np.searchsorted(ends, [start - epoch * self.total, stop - epoch * self.total], side='right')
      parts.append(order[low:high])
    return np.concatenate(parts)


class BatchPlan:
  """An endless sequence of batches for training.

  Attributes:
    shapes: sizes of every batch.
    report: what was cut, and the share of joint and alone positions that hold tokens in the probed windows.
  """

  def __init__(self, corpus: Corpus, *, batch_size: int, length: int, options: RowOptions, seed: int):
    self.corpus, self.options, self.seed = corpus, options, seed
    self.excerpts = excerpts(corpus, length=length, targets=options.targets, context_items=options.context_items)
    if not len(self.excerpts):
      raise UserError('The data has no training target: every history has fewer than two items in this split. '
                      'Leave-one-out holds the last two items of a history out, so training needs histories of four or more.')
    source_of = corpus.user_sources[self.excerpts.users]
    members = [np.flatnonzero(source_of == source) for source in range(len(corpus.rates))]
    used = [source for source, found in enumerate(members) if len(found)]
    self.streams = [Stream(self.excerpts, members[source], (seed, source)) for source in used]
    weights = np.asarray([corpus.rates[s] * self.excerpts.tokens[members[s]].mean() for s in used])
    self.token_shares = weights / weights.sum()
    self._choose_sizes(batch_size, options.tokens(length))
    self._window = functools.lru_cache(maxsize=2)(self._plan_window)
    steps = [self.layout(step) for step in range(options.window_steps)]
    self.report = {**corpus.cut, **self.excerpts.cut, 'excerpts': len(self.excerpts),
                   'targets': int(self.excerpts.n_targets.sum()),
                   'dropped_in_first_window': self._window(0)[1], **_fill(corpus, self.excerpts, steps, self.shapes)}

  def _choose_sizes(self, B: int, L: int) -> None:
    o = self.options
    self.window_tokens = o.window_steps * B * L
    probes = [_pack(self.excerpts, self._draw(w), (L, L), np.random.default_rng((self.seed, w))) for w in range(PROBES)]
    rows = [row for probe in probes for row in probe]
    self.limits = (L, self._spans_per_row(rows))
    self.window_tokens = int(self.window_tokens * (1 - SLACK) * o.window_steps * B / max(map(len, probes)))
    dealt = []
    for w in range(PROBES):
      rng = np.random.default_rng((self.seed, w))
      dealt += self._deal(_pack(self.excerpts, self._draw(w), self.limits, rng), B, rng)
    M, S = _alone_size(self.corpus, dealt, self.excerpts, B, o.alone_length, o.alone_slots)
    self.shapes = Shapes(B=B, L=L, M=M, E=self.limits[1], S=S)

  def _spans_per_row(self, rows: list[np.ndarray]) -> int:
    """The option's value; if it is None, what the fullest of the probed rows holds, and the fullest excerpt of all."""
    counts, given = self.excerpts.n_targets, self.options.spans_per_row
    largest = int(counts.max())
    if given is not None and given < largest:
      raise UserError(f'rows.spans_per_row = {given}: one history has {largest} targets in a row; raise it to {largest}, or '
                      'leave it out.')
    return given or _round_up(max([largest, *(counts[row].sum() for row in rows)]))

  def _draw(self, window: int) -> np.ndarray:
    """The excerpts of a window: each source gives its share of the tokens."""
    shares = self.token_shares * self.window_tokens
    return np.concatenate([stream.take(int(window * share), int((window + 1) * share))
                           for stream, share in zip(self.streams, shares, strict=True)])

  def _deal(self, rows: list[np.ndarray], B: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Deals B rows to each step: the row with most tokens to be read alone goes to the step that has fewest of them so far.

    Rows past the window's are left out; where there are too few, the last ones are empty.
    """
    n_steps = self.options.window_steps
    rows = rows[:n_steps * B]
    rows = rows + [np.zeros(0, np.int64)] * (n_steps * B - len(rows))
    texts = [np.unique(target_texts(self.corpus, self.excerpts, row)) for row in rows]
    weight = np.asarray([_text_lengths(self.corpus, text).sum() for text in texts])
    dealt: list[list[np.ndarray]] = [[] for _ in range(n_steps)]
    seen: list[set[int]] = [set() for _ in range(n_steps)]  # a text is read once a step
    lightest = [(0, tie, step) for step, tie in enumerate(rng.permutation(n_steps).tolist())]
    heapq.heapify(lightest)
    for row in np.lexsort((rng.random(len(rows)), -weight)).tolist():
      total, tie, step = heapq.heappop(lightest)
      new = [text for text in texts[row].tolist() if text not in seen[step]]
      seen[step].update(new)
      dealt[step].append(rows[row])
      if len(dealt[step]) < B:
        heapq.heappush(lightest, (total + int(_text_lengths(self.corpus, np.asarray(new, np.int64)).sum()), tie, step))
    return [[step[row] for row in rng.permutation(B)] for step in dealt]

  def _plan_window(self, window: int) -> tuple[list[BatchLayout], int]:
    """The layouts of the window's steps, and how many excerpts did not fit (0, or a warning)."""
    B = self.shapes.B
    chosen = self._draw(window)
    for attempt in range(ATTEMPTS):
      rng = np.random.default_rng((self.seed, window, attempt))
      steps = self._deal(_pack(self.excerpts, chosen, self.limits, rng), B, rng)
      layouts = [self._layout(step) for step in steps]
      dropped = len(chosen) - sum(len(row) for layout in layouts for row in layout.rows)
      if not dropped:
        break
    else:
      logging.warning('%d of %d histories of window %d do not fit its rows and are left out; raise rows.alone_length, or '
                      'rows.window_steps.', dropped, len(chosen), window)
    return layouts, dropped

  def _layout(self, rows: list[np.ndarray]) -> BatchLayout:
    """Packs the step's texts; where they need more than B alone rows, the step's last rows are left empty."""
    for kept in range(len(rows), -1, -1):
      used = rows[:kept] + [np.zeros(0, np.int64)] * (len(rows) - kept)
      alone = _pack_texts(self.corpus, _distinct_texts(self.corpus, self.excerpts, used), self.shapes.M, self.shapes.S)
      if len(alone) <= self.shapes.B:
        break
    return BatchLayout(used, alone + [np.zeros(0, np.int64)] * (self.shapes.B - len(alone)))

  def layout(self, step: int) -> BatchLayout:
    """The rows of a step."""
    window, index = divmod(step, self.options.window_steps)
    return self._window(window)[0][index]

  def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """The arrays of a step, or of some of its rows (see `rows.py`)."""
    return build_rows(self.corpus, self.excerpts, self.layout(step), self.shapes, rows)

  def lengths(self, step: int) -> tuple[np.ndarray, int]:
    """Tokens of each segment of a step, histories and texts alone; and how many target tokens it has."""
    layout = self.layout(step)
    chosen, texts = np.concatenate(layout.rows), np.concatenate(layout.alone_rows)
    return (np.concatenate([self.excerpts.tokens[chosen], _text_lengths(self.corpus, texts)]),
            int(self.excerpts.losses[chosen].sum()))

  def example_ids(self, step: int) -> list[str]:
    """The users whose histories make up a step."""
    return [self.corpus.user_ids[self.excerpts.users[e]] for row in self.layout(step).rows for e in row]


class OnePass:
  """Every excerpt once, for validation: as many batches of one shape as that takes, the last one filled with empty rows."""

  def __init__(self, corpus: Corpus, *, batch_size: int, length: int, options: RowOptions, max_histories: int | None = None):
    self.corpus, B = corpus, batch_size
    self.excerpts = excerpts(corpus, length=length, targets=options.targets, context_items=options.context_items)
    chosen = _spread_evenly(len(self.excerpts), max_histories)
    L = options.tokens(length)
    rows = _pack(self.excerpts, chosen, (L, L), None)
    steps = _in_steps(rows, B)
    M, S = _alone_size(corpus, steps, self.excerpts, B, None, None)
    spans = max((int(self.excerpts.n_targets[row].sum()) for row in rows), default=1)
    self.shapes = Shapes(B=B, L=L, M=M, E=_round_up(spans), S=S)
    self.layouts = []
    for step in steps:
      alone = _pack_texts(corpus, _distinct_texts(corpus, self.excerpts, step), M, S)
      self.layouts.append(BatchLayout(step, alone + [np.zeros(0, np.int64)] * (B - len(alone))))
    self.report = _fill(corpus, self.excerpts, self.layouts, self.shapes) if self.layouts else {}

  def __len__(self) -> int:
    return len(self.layouts)

  def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """The arrays of batch `step`, or of some of its rows."""
    return build_rows(self.corpus, self.excerpts, self.layouts[step], self.shapes, rows)

  def spans(self, step: int) -> np.ndarray:
    """Where the spans of a batch are in its flattened span table [B · E]; in the order of `targets`."""
    return np.concatenate([row * self.shapes.E + np.arange(int(self.excerpts.n_targets[chosen].sum()))
                           for row, chosen in enumerate(self.layouts[step].rows)])

  @property
  def targets(self) -> np.ndarray:
    """The text of every span, batch after batch: int64."""
    return target_texts(self.corpus, self.excerpts, self._chosen())

  @property
  def sources(self) -> np.ndarray:
    """The data set of every span's history: int64."""
    chosen = self._chosen()
    return np.repeat(self.corpus.user_sources[self.excerpts.users[chosen]], self.excerpts.n_targets[chosen])

  @functools.cached_property
  def seen(self) -> tuple[list[np.ndarray], np.ndarray]:
    """For every span, the texts of the other items that the user had bought before, each item once, int64 each; and whether the
    target itself had been: bool."""
    corpus, others, repeats = self.corpus, [], []
    for excerpt in self._chosen().tolist():
      first = corpus.offsets[self.excerpts.users[excerpt]]
      for place in range(self.excerpts.first_targets[excerpt], self.excerpts.stops[excerpt]):
        before, target = corpus.events[first:place], corpus.events[place]
        others.append(corpus.text_ids[np.setdiff1d(before, target)])
        repeats.append(target in before)
    return others, np.asarray(repeats, bool)

  def _chosen(self) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(row for layout in self.layouts for row in layout.rows)])


class TextPass:
  """Texts, each once, in alone rows: as many batches of one shape as that takes."""

  def __init__(self, corpus: Corpus, texts: np.ndarray, *, batch_size: int, length: int):
    self.corpus = corpus
    rows = _pack_texts(corpus, texts, length, length)
    self.rows = _in_steps(rows, batch_size)
    slots = _round_up(max((len(row) for row in rows), default=1))
    self.shapes = Shapes(B=batch_size, L=0, M=length, E=0, S=slots)

  def __len__(self) -> int:
    return len(self.rows)

  def batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """The alone arrays of batch `step`, or of some of its rows."""
    return build_alone_rows(self.corpus, self.rows[step][rows], self.shapes)

  def slots(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(texts, where they are among the flattened slots [B · S]) of a batch."""
    rows = self.rows[step]
    return np.concatenate(rows), np.concatenate([row * self.shapes.S + np.arange(len(texts)) for row, texts in enumerate(rows)])


def _in_steps(rows: list[np.ndarray], B: int) -> list[list[np.ndarray]]:
  """All rows, B a step; the last step is filled with empty ones."""
  rows = rows + [np.zeros(0, np.int64)] * (-len(rows) % B)
  return [rows[i:i + B] for i in range(0, len(rows), B)]


def _spread_evenly(n: int, most: int | None) -> np.ndarray:
  """Up to `most` of the numbers below n, at even distances: of a mixture, each source gives its share."""
  return np.arange(n) if most is None or most >= n else np.arange(most) * n // max(most, 1)


def _fill(corpus: Corpus, cut: Excerpts, layouts: list[BatchLayout], shapes: Shapes) -> dict[str, float]:
  """Shares of joint and alone positions that hold tokens."""
  joint = sum(int(cut.tokens[row].sum()) for layout in layouts for row in layout.rows)
  alone = sum(int(_text_lengths(corpus, row).sum()) for layout in layouts for row in layout.alone_rows)
  positions = len(layouts) * shapes.B
  return {'joint_fill': joint / (positions * shapes.L), 'alone_fill': alone / (positions * shapes.M)}
