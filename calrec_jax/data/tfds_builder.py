"""A histories folder as a TFDS dataset: a thin view, one example a user and split.

  builder = PurchaseHistories(folder='data/scientific2018', data_dir='tfds')
  builder.download_and_prepare()  # reads the folder alone; nothing is downloaded
  train = builder.as_dataset(split='train')

With `beam_options` or a `beam_runner` in its DownloadConfig, as any TFDS builder takes them, workers of Apache Beam write the
files: the same examples in the same order and shards. Each worker reads the folder itself.
"""

import functools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from calrec_jax.data import histories as histories_lib
from calrec_jax.data import tfds_shards, workers
from calrec_jax.data.histories import FIELDS, Histories

SPLITS = ('train', 'validation', 'test')


def visible_histories(histories: Histories, split: str) -> Iterator[tuple[int, np.ndarray]]:
  """(user number, the item indices that `split` may see: int32 [n]) of each user; the last one is the target.

  Users of whom `split` sees fewer than two events have no target, and are left out.
  """
  for user in tfds_shards.users_with_target(histories, split).tolist():
    yield user, histories.seen(user, split)


class PurchaseHistories(tfds.core.GeneratorBasedBuilder):
  """The visible events of each user of a histories folder: an item's id and its attributes, '' where unknown."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, folder: str | os.PathLike, **kwargs):
    """Takes the histories folder, and what every TFDS builder takes (`data_dir`, …).

    The configuration's name holds the data's fingerprint: a changed folder is another dataset, never a stale one.

    Raises:
      UserError: the folder is missing, or is no histories folder.
    """
    self._folder, self._histories = os.fspath(folder), histories_lib.load(folder)
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
    for user in tfds_shards.users_with_target(self._histories, split).tolist():
      yield user, tfds_shards.example(self._histories, user, split)

  def _generate_splits(self, dl_manager: tfds.download.DownloadManager, download_config: tfds.download.DownloadConfig
                       ) -> Sequence[tfds.core.SplitInfo]:
    """As TFDS does it; where Beam is asked for, on its workers. Raises UserError: see `tfds_shards.plan`, `workers.run`."""
    if not (download_config.beam_runner or download_config.beam_options):
      return super()._generate_splits(dl_manager, download_config)
    shards, infos = [], []
    for split in SPLITS:
      template = self._get_filename_template(split_name=split)
      of_split, n_bytes = tfds_shards.plan(
          self._folder, self._histories, split, config=download_config.get_shard_config(), template=template,
          limit=download_config.max_examples_per_split)
      shards += of_split
      infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[shard.end - shard.first for shard in of_split],
                                       num_bytes=n_bytes, filename_template=template))
    work = functools.partial(tfds_shards.write, features=self.info.features, writer=self._example_writer())
    workers.run(work, shards, options=download_config.beam_options, runner=download_config.beam_runner)
    return infos
