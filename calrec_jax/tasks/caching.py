"""Tasks cached as SeqIO reads them (`use_cached`), here or on workers of Apache Beam: the same files, in the uncached order.

SeqIO's own tool (`seqio_cache_tasks`) writes the examples in an order that differs from run to run.
"""

import contextlib
import dataclasses
import functools
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
import tqdm

from calrec_jax import outputs, storage
from calrec_jax.data import workers
from calrec_jax.errors import UserError
from calrec_jax.tasks import cached_task, registry
from calrec_jax.tasks.cache_layout import shard_numbers
from calrec_jax.tasks.source import HistoriesSource
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a worker makes a Task of.

  Attributes:
    folder: the histories folder.
    vocabulary: its file.
    template, targets: as of `HistoriesSource`.
    description: the Task's, as JSON: another one for a worker than for the program that started it is refused.
  """

  folder: str
  vocabulary: str
  template: ItemTemplate
  targets: str
  description: str = ''


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of a split: number `shard` of `n_shards`, at `path`."""

  recipe: Recipe
  split: str
  shard: int
  n_shards: int
  path: str


def cache(folder: str | os.PathLike, out: str | os.PathLike, *, vocabulary: str | os.PathLike,
          template: ItemTemplate = registry.PAPER_TEMPLATE, targets: str = 'last', beam: Sequence[str] | None = None) -> dict:
  """Caches the Task of a histories folder in the folder `out`/<its name>.

  In a bucket, or written by workers of other machines, that folder is no cache before its last file, COMPLETED.

  Args:
    folder: the histories folder; workers read it, and the vocabulary, themselves.
    out: a folder of caches, such as T5X's --seqio_additional_cache_dirs.
    vocabulary: its file.
    template: writes an item's text.
    targets: spans of the train split, `last` or `all`.
    beam: flags of Apache Beam's pipeline options; None: the work is done here, without Beam.

  Returns:
    'task', 'out', 'examples' and 'shards' of each split, and 'cached', False if the same cache was there already.

  Raises:
    UserError: bad input, no Beam, or `out`/<name> is in use.
  """
  recipe = Recipe(os.fspath(folder), os.fspath(vocabulary), template, targets)
  registry.check_name(os.path.basename(recipe.folder.rstrip('/')))
  task = _make(recipe)
  recipe = dataclasses.replace(recipe, description=_as_json(task.cached_description))
  place = storage.join(out, seqio.get_task_dir_from_name(task.name))
  shards = {split: len(task.source.list_shards(split)) for split in task.splits}
  report = {'task': task.name, 'out': place, 'shards': shards,
            'examples': {split: task.num_input_examples(split) for split in task.splits}}
  if cached_task.read_description(place) == task.cached_description:
    return report | {'cached': False}
  with _written_whole(place) as scratch:
    parts = [Shard(recipe, split, k, n, f'{seqio.get_cached_tfrecord_prefix(scratch, split)}-{k:05}-of-{n:05}')
             for split, n in shards.items() for k in range(n)]
    if beam is None:
      for part in tqdm.tqdm(parts, desc=f'cache {task.name}', unit=' files', disable=None):
        write_shard(part, task)
    else:
      workers.run(write_shard, parts, options=list(beam))
    for split, n in shards.items():
      _write_json(seqio.get_cached_info_path(scratch, split), _info(task, split, n))
      _write_json(seqio.get_cached_stats_path(scratch, split), {'examples': report['examples'][split]})
    _write_json(os.path.join(scratch, cached_task.DESCRIPTION), task.cached_description)
    _write_text(os.path.join(scratch, 'COMPLETED'), '')
  return report | {'cached': True}


def write_shard(part: Shard, task: seqio.Task | None = None) -> None:
  """Writes a file, which appears whole, of `task`, or of the one that a worker makes.

  Raises UserError if that one is another Task than the recipe's, or the file cannot be written.
  """
  task = task or _task(part.recipe)
  numbers = shard_numbers(task.num_input_examples(part.split), part.shard, part.n_shards)
  scratch = f'{part.path}.{uuid.uuid4().hex}'  # another worker may be at the same part
  try:
    with _told(part.path):
      with tf.io.TFRecordWriter(scratch) as writer:
        for example in task.preprocess_precache(task.source.get_examples(part.split, numbers)).as_numpy_iterator():
          writer.write(tf_example(example).SerializeToString(deterministic=True))
      tf.io.gfile.rename(scratch, part.path, overwrite=True)
  finally:
    if tf.io.gfile.exists(scratch):
      tf.io.gfile.remove(scratch)


def tf_example(example: Mapping[str, np.ndarray | bytes]) -> tf.train.Example:
  """As `seqio.dict_to_tfexample` of texts and int32 arrays, which takes ten times as long."""
  features = {}
  for name, value in example.items():
    if isinstance(value, bytes) or value.dtype == object:
      features[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[value] if isinstance(value, bytes) else value))
    else:
      features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=value))
  return tf.train.Example(features=tf.train.Features(feature=features))


@functools.lru_cache(maxsize=1)  # a worker writes many files of one Task
def _task(recipe: Recipe) -> seqio.Task:
  task = _make(recipe)
  if _as_json(task.cached_description) != recipe.description:
    raise UserError(f'{recipe.folder}: the histories or the vocabulary are others for this worker than for the program that '
                    'started it; run it again.')
  return task


def _make(recipe: Recipe) -> seqio.Task:
  source = HistoriesSource(recipe.folder, template=recipe.template, targets=recipe.targets)
  source.require_folder()
  return registry.make_task(source, load_vocabulary(recipe.vocabulary))


def _info(task: seqio.Task, split: str, n_shards: int) -> dict:
  """What SeqIO has to know of a split's files."""
  spec = task.preprocess_precache(task.source.get_examples(split, shard_numbers(0, 0, 1))).element_spec
  features = {name: {'shape': [None] * len(tensor.shape), 'dtype': tensor.dtype.name} for name, tensor in spec.items()}
  return {'num_shards': n_shards, 'features': features, 'seqio_version': seqio.__version__}


@contextlib.contextmanager
def _written_whole(place: str) -> Iterator[str]:
  """Yields the folder to write into, which is `place` in the end; a bucket's is `place` itself, as all workers reach it."""
  if storage.is_bucket(place):
    outputs.check_unused(place)
    yield place
  else:
    with outputs.new_folder(place) as scratch:
      yield os.fspath(scratch.absolute())


def _as_json(value: dict) -> str:
  return json.dumps(value, indent=2, sort_keys=True) + '\n'


def _write_json(path: str, value: dict) -> None:
  _write_text(path, _as_json(value))


def _write_text(path: str, text: str) -> None:
  with _told(path), tf.io.gfile.GFile(path, 'w') as file:
    file.write(text)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
  """What TensorFlow says where it cannot write, such as on a full disk, becomes a UserError."""
  try:
    yield
  except tf.errors.OpError as error:
    raise UserError(f'{path}: cannot be written ({error.message.splitlines()[0]}); make room, or choose another place.'
                    ) from error
