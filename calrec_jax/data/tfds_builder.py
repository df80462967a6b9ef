"""A histories folder as a TFDS dataset: a thin view, one example a user and split.

  builder = PurchaseHistories(folder='data/scientific2018', data_dir='tfds')
  builder.download_and_prepare()  # reads the folder alone; nothing is downloaded
  train = builder.as_dataset(split='train')
"""

import os
import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import FIELDS, Histories

SPLITS = ('train', 'validation', 'test')


def visible_histories(histories: Histories, split: str) -> Iterator[tuple[int, np.ndarray]]:
  """(user number, the item indices that `split` may see: int32 [n]) of each user; the last one is the target.

  Users of whom `split` sees fewer than two events have no target, and are left out.
  """
  for user in range(len(histories.user_ids)):
    events = histories.seen(user, split)
    if len(events) >= 2:
      yield user, events


class PurchaseHistories(tfds.core.GeneratorBasedBuilder):
  """The visible events of each user of a histories folder: an item's id and its attributes, '' where unknown."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, folder: str | os.PathLike, **kwargs):
    """Takes the histories folder, and what every TFDS builder takes (`data_dir`, …).

    The configuration's name holds the data's fingerprint: a changed folder is another dataset, never a stale one.

    Raises:
      UserError: the folder is missing, or is no histories folder.
    """
    self._histories = histories_lib.load(folder)
    name = f'{re.sub(r"[^A-Za-z0-9_.]", "_", self._histories.name)}.{self._histories.fingerprint[:12]}'
    super().__init__(config=tfds.core.BuilderConfig(name=name, description=str(folder)), **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    texts = {field: tfds.features.Text() for field in ('item_id', *FIELDS)}
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({
            'user_id': tfds.features.Text(), 'items': tfds.features.Sequence(texts)}))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # there is nothing to download
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    data = self._histories
    for user, events in visible_histories(data, split):
      items = [{'item_id': data.item_ids[item], **{field: data.items[item][field] for field in FIELDS}}
               for item in events]
      yield user, {'user_id': data.user_ids[user], 'items': items}
