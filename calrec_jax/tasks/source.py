"""A histories folder as a SeqIO data source: an example for each span (a target, and the items before it)."""

import functools
import json
import os
from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf

from calrec_jax import storage
from calrec_jax.data import histories as histories_lib
from calrec_jax.data import tfds_shards
from calrec_jax.data.histories import Histories
from calrec_jax.data.tfds_builder import SPLITS, visible_histories
from calrec_jax.errors import UserError
from calrec_jax.tasks import cache_layout, categories
from calrec_jax.text.templates import ItemTemplate

_SPEC = {'user_id': tf.TensorSpec([], tf.string), 'item_texts': tf.TensorSpec([None], tf.string)}


class HistoriesSource(seqio.DataSource):
  """The spans of a histories folder as text; the folder is read when it is first used, and need not exist before.

  An example is {'user_id': text, 'item_texts': texts [n]}, n >= 2, the last one the target. Splits are leave-one-out.
  """

  def __init__(self, folder: str | os.PathLike, *, template: ItemTemplate, targets: str):
    """`targets`: the spans of the train split. `last`: a user's newest visible item; `all`: each item after the first.

    Validation and test always have one span a user, the newest visible item. Raises UserError for another value.
    """
    if targets not in ('last', 'all'):
      raise UserError(f"targets = {targets!r}: choose 'last' or 'all'.")
    super().__init__(SPLITS)
    self.folder = os.fspath(folder)
    self._template = template
    self._targets = targets

  @property
  def name(self) -> str:
    """The data set's: its folder's."""
    return os.path.basename(self.folder.rstrip('/'))

  def require_folder(self) -> None:
    """Raises UserError, with the command that makes the folder, if it is missing."""
    if not storage.is_dir(self.folder):
      command = categories.prepare_command(self.name, self.folder)
      raise UserError(f'{self.folder}: the data set {self.name!r} is not there; make it: {command}')

  @functools.cached_property
  def histories(self) -> Histories:
    """The data set. Raises UserError if the folder is missing or damaged."""
    self.require_folder()
    return histories_lib.load(self.folder)

  @functools.cached_property
  def n_users(self) -> int:
    """Users of the data set, from dataset.json where there is one: a mixture's rates need no histories in memory."""
    try:
      return self._described['statistics']['users']
    except (KeyError, TypeError):
      return len(self.histories.user_ids)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Of the histories' content, from dataset.json where there is one."""
    found = self._described.get('fingerprint')
    return found if isinstance(found, str) else self.histories.fingerprint

  @functools.cached_property
  def _described(self) -> dict:
    try:
      about = storage.local(storage.join(self.folder, 'dataset.json'))
      found = json.loads(about.read_text(encoding='utf-8'))
    except (UserError, OSError, ValueError):
      return {}
    return found if isinstance(found, dict) else {}

  @property
  def options(self) -> dict:
    """What the examples depend on beside the histories."""
    return {'fields': list(self._template.fields), 'unknown': self._template.unknown, 'targets': self._targets}

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    """A name for each file that a cache of the split has; see `cache_layout`."""
    n = cache_layout.n_shards(self._text_bytes(split), self.num_input_examples(split))
    return [f'{split}-{k:05}-of-{n:05}' for k in range(n)]

  def num_input_examples(self, split: str) -> int:
    return int(self._spans(split)[1].sum())

  def get_dataset(self, split: str = 'train', shuffle: bool = True, seed: int | None = None,
                  shard_info: seqio.ShardInfo | None = None, **unused) -> tf.data.Dataset:
    """The examples of `split` in the order of the folder's users, or of a permutation of them drawn with `seed`.

    A shard holds every `num_shards`-th user.
    """
    del unused
    users = list(visible_histories(self.histories, split))
    if shard_info is not None:
      users = users[shard_info.index::shard_info.num_shards]
    if shuffle:
      users = [users[i] for i in np.random.default_rng(None if seed is None else int(seed)).permutation(len(users))]
    return tf.data.Dataset.from_generator(lambda: self._examples(users, split), output_signature=_SPEC)

  def get_examples(self, split: str, numbers: np.ndarray) -> tf.data.Dataset:
    """The examples of these numbers (int64 [.]) among those of `get_dataset` without shuffling."""
    users, n_spans = self._spans(split)
    ends = np.cumsum(n_spans)
    places = np.searchsorted(ends, numbers, side='right')
    # A user's spans are of 2, 3, … events where there are several, else of all.
    lengths = self.histories.visible(split)[users[places]] - (ends[places] - 1 - numbers)

    def examples() -> Iterator[dict]:
      for user, length in zip(users[places].tolist(), lengths.tolist(), strict=True):
        texts = [self._texts[item] for item in self.histories.history(user)[:length]]
        yield {'user_id': self.histories.user_ids[user], 'item_texts': texts}
    return tf.data.Dataset.from_generator(examples, output_signature=_SPEC)

  def _spans(self, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The users with a target, and how many spans each has: int64 [U] both."""
    users = tfds_shards.users_with_target(self.histories, split)
    return users, self.histories.visible(split)[users] - 1 if self._all(split) else np.ones_like(users)

  def _text_bytes(self, split: str) -> int:
    """The bytes of the texts of all examples."""
    data, bytes_I = self.histories, np.array([len(text.encode()) for text in self._texts], np.int64)
    visible_E, places_E = data.visible(split)[data.event_users], data.event_places
    # An event is in the spans that end at it or later; the first span has two events.
    spans_E = visible_E - np.maximum(places_E, 1) if self._all(split) else visible_E >= 2
    return int((bytes_I[data.events] * spans_E * (places_E < visible_E)).sum())

  def _examples(self, users: list[tuple[int, np.ndarray]], split: str) -> Iterator[dict]:
    for user, events in users:
      texts = [self._texts[item] for item in events]
      for n in range(2 if self._all(split) else len(texts), len(texts) + 1):
        yield {'user_id': self.histories.user_ids[user], 'item_texts': texts[:n]}

  @functools.cached_property
  def _texts(self) -> list[str]:
    return [self._template.item_text(item) for item in self.histories.items]

  def _all(self, split: str) -> bool:
    return self._targets == 'all' and split == 'train'
