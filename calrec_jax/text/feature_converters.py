"""The rows of `rows.py` as a SeqIO feature converter, for who reads the Tasks through SeqIO or T5X.

`calrec train` does not come here: it plans its batches (`batches.py`). The rows are the same, but for what a converter
cannot know, as it sees one row at a time and not the batch:

- A text alone lies in the row of its span, and `span_slots` counts the row's own slots; `batch_slots` makes them slots
  of the batch. A text that is the target in two rows is encoded twice.
- A text's identity is a hash of its tokens, the same in every process, where a corpus numbers its texts.
- An item's number counts the items that the row holds, where a corpus counts those of the whole history.
- The share of a text (`span_log_shares`) is that among the examples that are packed together, not among all.
"""

import collections
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from calrec_jax.errors import UserError
from calrec_jax.text.corpus import Corpus, Excerpts, excerpts
from calrec_jax.text.packing import fill_rows
from calrec_jax.text.rows import BatchLayout, Shapes, build_rows
from calrec_jax.text.templates import FIRST, NEXT

Spec = seqio.FeatureConverter.FeatureSpec


def batch_slots(span_slots_BE: Any, slots_per_row: int) -> Any:
  """`span_slots` of a batch of converted rows, as slots of the batch, which the two towers read: row · S is added.

  Takes and returns int32 [B, E], of numpy or of JAX.
  """
  return span_slots_BE + slots_per_row * np.arange(len(span_slots_BE), dtype=np.int32)[:, None]


def text_identity(tokens: np.ndarray) -> int:
  """A number from 1 to 2³¹ − 1 that equal tokens share; two texts share one by chance once in 2·10⁹ pairs."""
  digest = hashlib.blake2b(np.asarray(tokens, '<i4').tobytes(), digest_size=8).digest()
  return int.from_bytes(digest, 'little') % (2**31 - 1) + 1


def item_runs(inputs: np.ndarray, first: np.ndarray, following: np.ndarray) -> list[tuple[int, int]]:
  """(start, stop) of each item's tokens in a user part: FIRST, an item, NEXT, an item, …, NEXT.

  The cut is exact: NEXT begins with a line break, and no item's text holds one. Raises UserError for other inputs.
  """
  n = len(following)
  windows = np.lib.stride_tricks.sliding_window_view(np.pad(inputs, (0, n), constant_values=-1), n)
  prompts = np.flatnonzero((windows == following[None, :]).all(axis=1)).tolist()
  if inputs[:len(first)].tolist() != first.tolist() or not prompts or prompts[-1] + n != len(inputs):
    raise UserError("'inputs' is not a user part of this vocabulary: FIRST, then items with NEXT after each. Take a "
                    'Task of calrec_jax.tasks that was registered with the vocabulary of the converter.')
  return list(zip([len(first), *(prompt + n for prompt in prompts)], prompts, strict=False))


class CalRecFeatureConverter(seqio.FeatureConverter):
  """Turns the examples of a Task (`calrec_jax.tasks`) into rows, packed or one example a row.

  Two examples in one row of L = 13 + 3, with alone_length 4 and spans_per_row 2; 2 is FIRST, 3 is NEXT, 1 is EOS:

    inputs         [2 7 8 3 9 3]  and  [2 5 6 3]        task_feature_lengths['inputs'] = 13
    targets        [7 8 1]        and  [9 1]            task_feature_lengths['targets'] = 3: this caps an item's text

    tokens         [2 7 8 3 9 3 7 8 2 5 6 3 9 0 0 0]
    labels         [7 8 1 9 1 7 8 1 5 6 1 9 1 0 0 0]
    segments       [1 1 1 1 1 1 1 1 2 2 2 2 2 0 0 0]
    positions      [0 1 2 3 4 5 6 7 0 1 2 3 4 0 0 0]
    items          [0 1 1 0 2 0 3 3 0 1 1 0 2 0 0 0]
    loss_weights   [0 0 0 0 0 1 1 1 0 0 0 1 1 0 0 0]
    alone_tokens   [7 8 9 0]
    alone_segments [1 1 2 0]
    alone_positions [0 1 0 0]
    slot_texts     [591453634 1708426696]
    span_segments  [1 2]
    span_items     [3 2]
    span_slots     [0 1]
    span_texts     [591453634 1708426696]
    span_log_shares [-0.693 -0.693]

  `rows.py` says what each of them is. A history longer than a row keeps its newest whole items; if even two items do
  not fit, reading the rows fails and names the length that would do. A Task that is read with `sequence_length`
  (`seqio.get_dataset` does so) is already cut to 'inputs' tokens, and its target to one less than 'targets'; read
  without it, and with `apply_length_check=False` here, the row's whole length is used.

  Attributes:
    report: counts of what was read so far: `histories`, `histories_cut`, `context_items_cut`, `items_cut` (each time
      that an item occurs) and `item_tokens_cut`.
  """

  TASK_FEATURES = {'inputs': Spec(tf.int32), 'targets': Spec(tf.int32)}
  MODEL_FEATURES = {
      name: Spec(tf.as_dtype(dtype)) for name, (_, dtype) in Shapes(1, 1, 1, 1, 1).features().items()}
  PACKING_FEATURE_DTYPES: Mapping[str, tf.dtypes.DType] = {}  # segments and positions are there without packing too

  def __init__(self, vocabulary: seqio.Vocabulary, *, pack: bool = True, alone_length: int | None = None,
               spans_per_row: int = 16, buffer_examples: int = 1024, apply_length_check: bool = True,
               use_custom_packing_ops: bool = False):
    """Args as `seqio.FeatureConverter`'s, and:

    Args:
      vocabulary: the Task's.
      alone_length: M, with packing. None: half a row, and at least the longest target. Without packing: the latter.
      spans_per_row: E and S, the most examples that are packed in a row.
      buffer_examples: this many examples are packed together.

    Raises:
      UserError: the vocabulary drops line breaks, so that items could not be told apart.
    """
    super().__init__(pack=pack, apply_length_check=apply_length_check, use_custom_packing_ops=use_custom_packing_ops)
    self._first, self._next = (np.asarray(vocabulary.encode(prompt), np.int32) for prompt in (FIRST, NEXT))
    if '\n' not in vocabulary.decode(self._next.tolist()):
      raise UserError('The vocabulary drops line breaks, which keep items apart; take one that encodes all characters.')
    self._bos = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    self._eos = vocabulary.eos_id
    self._alone_length, self._spans_per_row, self._buffer_examples = alone_length, spans_per_row, buffer_examples
    self.report: collections.Counter[str] = collections.Counter()

  def shapes(self, task_feature_lengths: Mapping[str, int]) -> Shapes:
    """The sizes of one row. Raises UserError if `alone_length` cannot hold a target."""
    L = task_feature_lengths['inputs'] + task_feature_lengths['targets']
    longest = task_feature_lengths['targets'] + len(self._bos)
    if not self.pack:
      return Shapes(B=1, L=L, M=longest, E=1, S=1)
    M, E = self._alone_length or max(L // 2, longest), self._spans_per_row
    if longest > M:
      raise UserError(f"alone_length = {M}: a target may have {longest} tokens; raise it, or lower 'targets'.")
    return Shapes(B=1, L=L, M=M, E=E, S=E)

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
    """The length of each feature of a row."""
    return {name: shape[1] for name, (shape, _) in self.shapes(task_feature_lengths).features().items()}

  def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
    shapes = self.shapes(task_feature_lengths)
    pairs = ds.map(lambda example: (example['inputs'], example['targets']))
    spec = {name: tf.TensorSpec(shape[1:], dtype) for name, (shape, dtype) in shapes.features().items()}
    rows = tf.data.Dataset.from_generator(
        lambda: self._rows(pairs.as_numpy_iterator(), shapes, task_feature_lengths['targets']), output_signature=spec)
    n_examples = int(ds.cardinality())  # below 0: not known, or endless
    # SeqIO's evaluator asks for the number of rows: without packing each example is one.
    return rows if self.pack or n_examples < 0 else rows.apply(tf.data.experimental.assert_cardinality(n_examples))

  def _rows(self, examples: Iterator[tuple[np.ndarray, np.ndarray]], shapes: Shapes,
            max_item_tokens: int) -> Iterator[dict[str, np.ndarray]]:
    while buffer := list(itertools.islice(examples, self._buffer_examples)):
      corpus, identities = self._corpus(buffer, max_item_tokens)
      cut = excerpts(corpus, length=shapes.L, targets='last', context_items=0)
      self.report.update({'histories': len(cut), 'histories_cut': cut.cut['histories_cut'],
                          'context_items_cut': cut.cut['context_items_cut'], **corpus.cut})
      targets = corpus.text_ids[cut.stops - 1]
      for row in self._packed(corpus, cut, shapes):
        layout = BatchLayout([row], [np.unique(targets[row])])
        arrays = {name: array[0] for name, array in build_rows(corpus, cut, layout, shapes).items()}
        yield arrays | {name: identities[arrays[name]] for name in ('slot_texts', 'span_texts')}

  def _packed(self, corpus: Corpus, cut: Excerpts, shapes: Shapes) -> list[np.ndarray]:
    """The excerpts of each row; none has more target tokens than its alone part holds, equal texts counted each.

    Packed rows come in a drawn order: `fill_rows` begins with the longest pieces, and so would a batch hold pieces of one
    length, or one history many times where a small data set is repeated.
    """
    if not self.pack:
      return [np.array([number]) for number in range(len(cut))]
    alone = corpus.item_lengths[cut.stops - 1] + corpus.bos_length
    sizes = np.stack([cut.tokens, alone, np.ones_like(alone)], axis=1)
    rows = fill_rows(sizes, np.array([shapes.L, shapes.M, shapes.S]))
    return [rows[number] for number in np.random.default_rng(0).permutation(len(rows))]

  def _corpus(self, examples: Sequence[tuple[np.ndarray, np.ndarray]],
              max_item_tokens: int) -> tuple[Corpus, np.ndarray]:
    """A corpus of the examples, each a user whose items are its own, and the identity of each of its texts (0: none).

    Only targets have texts here: an item of a user part is 0.
    """
    starts, lengths, text_ids, text_items, counts, n_tokens = [], [], [], [0], [0], 0
    texts: dict[bytes, int] = {}
    identities = [0]
    for inputs, targets in examples:
      target = targets[:-1] if len(targets) and targets[-1] == self._eos else targets
      runs = [*item_runs(inputs, self._first, self._next), (len(inputs), len(inputs) + len(target))]
      text = texts.setdefault(target.tobytes(), len(identities))
      if text == len(identities):
        identities.append(text_identity(target))
        text_items.append(len(starts) + len(runs) - 1)
      starts += [n_tokens + start for start, _ in runs]
      lengths += [stop - start for start, stop in runs]
      text_ids += [0] * (len(runs) - 1) + [text]
      counts.append(len(runs))
      n_tokens += len(inputs) + len(targets)
    lengths = np.asarray(lengths, np.int64)
    over = np.maximum(lengths - max_item_tokens, 0)
    bank = [*(part for example in examples for part in example), self._next, self._bos, self._first]
    return Corpus(
        bank=np.concatenate(bank).astype(np.int32),
        item_starts=np.asarray(starts, np.int64), item_lengths=lengths - over,
        item_sources=np.zeros(len(starts), np.int64),
        text_ids=np.asarray(text_ids, np.int64), text_items=np.asarray(text_items, np.int64),
        opener=(n_tokens + len(self._next), len(self._bos) + len(self._first)), next_prompt=(n_tokens, len(self._next)),
        bos_length=len(self._bos), eos=self._eos, events=np.arange(len(starts)), offsets=np.cumsum(counts),
        user_ids=[''] * len(examples), user_sources=np.zeros(len(examples), np.int64), rates=np.ones(1),
        cut={'items_cut': int((over > 0).sum()), 'item_tokens_cut': int(over.sum())},
    ), np.asarray(identities, np.int32)
