"""The files of a TFDS view, and what is in them."""

import os
import pathlib

import tensorflow as tf
import tensorflow_datasets as tfds
import tiny

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.tfds_builder import PurchaseHistories


def write_toy(folder: pathlib.Path, *, users: int) -> pathlib.Path:
  """Writes a histories folder."""
  folder.mkdir(parents=True)
  histories_lib.write(folder, tiny.make_histories('toy', users=users), {})
  return folder


def prepare(folder: str | os.PathLike, data_dir: str | os.PathLike, **config) -> PurchaseHistories:
  """Generates the view of a histories folder; `config` is TFDS's DownloadConfig."""
  builder = PurchaseHistories(folder=folder, data_dir=data_dir)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**config))
  return builder


def files(builder: PurchaseHistories) -> dict[str, list]:
  """The examples in each file; not their bytes, as protocol buffers write a map in any order."""
  return {path.name: [tf.train.Example.FromString(each) for each in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()]
          for path in sorted(builder.data_path.glob('*.tfrecord-*'))}
