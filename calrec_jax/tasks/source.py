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
from calrec_jax.data.histories import Histories
from calrec_jax.data.tfds_builder import SPLITS, visible_histories
from calrec_jax.errors import UserError
from calrec_jax.tasks import categories
from calrec_jax.text.templates import ItemTemplate


class HistoriesSource(seqio.DataSource):
  """The spans of a histories folder as text; the folder is read when it is first used, and need not exist before.

  An example is {'user_id': text, 'item_texts': texts [n]}, n >= 2, the last one the target. Splits are leave-one-out.
  """

  def __init__(self, folder: str | os.PathLike, *, template: ItemTemplate, targets: str):
    """`targets`: the spans of the train split. `last`: a user's newest visible item; `all`: each item after the first.

    Validation and test always have one span a user, the newest visible item.
    """
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
      about = storage.local(storage.join(self.folder, 'dataset.json'))
      return json.loads(about.read_text(encoding='utf-8'))['statistics']['users']
    except (UserError, OSError, ValueError, KeyError, TypeError):
      return len(self.histories.user_ids)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def num_input_examples(self, split: str) -> int:
    return sum(len(events) - 1 if self._all(split) else 1 for _, events in visible_histories(self.histories, split))

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
    spec = {'user_id': tf.TensorSpec([], tf.string), 'item_texts': tf.TensorSpec([None], tf.string)}
    return tf.data.Dataset.from_generator(lambda: self._examples(users, split), output_signature=spec)

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
