"""The TFDS view in shards that are known before they are written, so that each may be written elsewhere.

TFDS orders a split by a hash of its keys, and cuts it into shards of as many examples; how many shards follows from the bytes.
All of it follows from the histories alone, so a worker that has them writes the very file that TFDS would write.
"""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import shard_utils

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import FIELDS, Histories
from calrec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of a split.

  Attributes:
    folder: the histories folder.
    fingerprint: of its content.
    split: of the view.
    n_users: the split is of so many users with a target, the first ones.
    first, end: the file's examples, numbers in the order of the split.
    path: the file.
  """

  folder: str
  fingerprint: str
  split: str
  n_users: int
  first: int
  end: int
  path: str


def users_with_target(data: Histories, split: str) -> np.ndarray:
  """The numbers of the users of whom `split` sees two events or more: int64 [.]."""
  return np.flatnonzero(data.visible(split) >= 2)


def example(data: Histories, user: int, split: str) -> dict:
  """What `split` may see of a user: the id, and for each event the item's id and attributes."""
  items = [{'item_id': data.item_ids[item], **{field: data.items[item][field] for field in FIELDS}}
           for item in data.seen(user, split)]
  return {'user_id': data.user_ids[user], 'items': items}


def plan(folder: str | os.PathLike, data: Histories, split: str, *, config: Any, template: Any, limit: int | None = None
         ) -> tuple[list[Shard], int]:
  """The shards of a split, and the bytes of its examples.

  Args:
    folder: where the workers find the histories.
    data: the histories.
    split: of the view.
    config: TFDS's ShardConfig.
    template: TFDS's ShardedFileTemplate.
    limit: the split is of so many users at most.

  Raises:
    UserError: no user has a target in this split, or more shards than examples are asked for.
  """
  users = users_with_target(data, split)[:limit]
  n_bytes = int(example_bytes(data, users, split).sum())
  n_shards = config.get_number_shards(n_bytes, len(users))
  if len(users) < n_shards:
    raise UserError(f'{folder}: {len(users)} users have a target in the split {split!r}, which cannot be {n_shards} shards.')
  ends = shard_utils.get_shard_boundaries(len(users), n_shards)
  return [Shard(os.fspath(folder), data.fingerprint, split, len(users), first, end,
                os.fspath(template.sharded_filepath(shard_index=k, num_shards=n_shards)))
          for k, (first, end) in enumerate(zip([0, *ends], ends, strict=False))], n_bytes


def write(shard: Shard, features: tfds.features.FeaturesDict, writer: Any) -> None:
  """Writes a shard with TFDS's ExampleWriter; it appears whole. Raises UserError if the histories have changed."""
  data = _histories(shard.folder, shard.fingerprint)
  users = _in_order(shard.folder, shard.fingerprint, shard.split, shard.n_users)[shard.first:shard.end]
  with tfds.core.utils.incomplete_file(tfds.core.Path(shard.path)) as scratch:
    writer.write(scratch, ((user, features.serialize_example(example(data, user, shard.split))) for user in users.tolist()))


@functools.lru_cache(maxsize=1)  # a worker writes many shards of one folder
def _histories(folder: str, fingerprint: str) -> Histories:
  data = histories_lib.load(folder)
  if data.fingerprint != fingerprint:
    raise UserError(f'{folder}: is another data set for this worker than for the program that started it; run it again.')
  return data


@functools.lru_cache(maxsize=3)
def _in_order(folder: str, fingerprint: str, split: str, n_users: int) -> np.ndarray:
  """The users of a split in TFDS's order: int64 [n_users]."""
  users = users_with_target(_histories(folder, fingerprint), split)[:n_users].tolist()
  return np.array(sorted(users, key=hashing.Hasher(split).hash_key), np.int64)


def example_bytes(data: Histories, users_U: np.ndarray, split: str) -> np.ndarray:
  """Of each user's example, serialized as a tf.train.Example: int64 [U].

  It is Example(Features(map of a name to Feature(BytesList(texts)))), each level a field with its length before it.
  """
  begins_U, ends_U = data.offsets[users_U], data.offsets[users_U] + data.visible(split)[users_U]
  lists = {'user_id': _field(np.array([len(text.encode()) for text in data.user_ids], np.int64))[users_U]}
  for field, texts in {'item_id': data.item_ids, **{f: [item[f] for item in data.items] for f in FIELDS}}.items():
    values_I = _field(np.array([len(text.encode()) for text in texts], np.int64))
    total_E = np.concatenate([[0], np.cumsum(values_I[data.events])])
    lists[f'items/{field}'] = total_E[ends_U] - total_E[begins_U]
  return _field(sum(_field(_field(np.int64(len(name))) + _field(_field(list_U))) for name, list_U in lists.items()))


def _field(length: np.ndarray) -> np.ndarray:
  """The bytes of a protocol buffer's field that holds so many: a tag, their number in 7 bits a byte, and they."""
  return 1 + sum((length >= 2 ** bits).astype(np.int64) for bits in range(7, 63, 7)) + 1 + length
