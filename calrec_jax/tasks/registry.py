"""SeqIO Tasks, one for each histories folder, and the stage I Mixture of them.

A Task *defines* an example, for people, for T5X and for SeqIO's caching; training reads the same examples at random
from the histories and the item token table. It has, without `sequence_length`:

  inputs                 int32 [.], the tokens of the user part's pieces: FIRST, an item, NEXT, an item, …, NEXT
  targets                int32 [.], the tokens of the target's piece, then EOS (the end-of-item label)
  inputs_pretokenized, targets_pretokenized, user_id    texts; joined, the first two are the whole history

There is no BOS: where a vocabulary has one, who makes rows puts it first.
"""

import functools
import os
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from calrec_jax import storage
from calrec_jax.errors import UserError
from calrec_jax.tasks import seqio_metrics
from calrec_jax.tasks.cached_task import HistoriesTask
from calrec_jax.tasks.categories import CATEGORIES
from calrec_jax.tasks.source import HistoriesSource
from calrec_jax.text.item_tokens import item_tokens, prompt_tokens, user_tokens
from calrec_jax.text.templates import ItemTemplate, text_pair
from calrec_jax.text.vocabularies import TokenizerVocabulary

STAGE1_MIXTURE = 'stage1_mixture'
PAPER_TEMPLATE = ItemTemplate()
EXPONENT = 0.3  # a category's rate is its number of users to this power (method: Data)


def register(data_dir: str | os.PathLike, vocabulary: TokenizerVocabulary, *, names: Sequence[str] | None = None,
             template: ItemTemplate = PAPER_TEMPLATE, targets: str = 'last', mixture: str = STAGE1_MIXTURE,
             mixture_names: Sequence[str] | None = None, exponent: float = EXPONENT) -> list[str]:
  """Registers a Task for each data set and the Mixture over them; one of the same name is replaced.

  A Task whose folder is missing raises UserError when it is used, not here.

  Args:
    data_dir: holds the histories folders; a Task is named as its folder.
    vocabulary: of the Tasks' features.
    names: the data sets. None: the method's 13 categories, and each histories folder in `data_dir`.
    template: writes an item's text.
    targets: spans of the train split, `last` or `all`; see `HistoriesSource`.
    mixture: the Mixture's name.
    mixture_names: what it is over. None: each of `names` that has a folder (all of `names` if none has).
    exponent: of the Mixture's rates, n_users ** exponent.

  Returns:
    The names of the Tasks, sorted.

  Raises:
    UserError: no such `data_dir`, a name that SeqIO does not allow, or a wrong value.
  """
  if not storage.is_dir(data_dir):
    raise UserError(f'{data_dir}: no such folder; DATA_DIR is the folder that holds the histories folders.')
  present = _folders(data_dir)
  names = sorted(set(names) if names is not None else {*CATEGORIES, *present})
  mixed = sorted(set(mixture_names)) if mixture_names else [name for name in names if name in present] or names
  _check_names(names, mixture, mixed, present)
  for name in names:
    source = HistoriesSource(storage.join(data_dir, name), template=template, targets=targets)
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add_provider(name, make_task(source, vocabulary))
  seqio.MixtureRegistry.remove(mixture)
  seqio.MixtureRegistry.add(mixture, [(name, lambda task: task.source.n_users ** exponent) for name in mixed])
  return names


def resolve(name: str) -> list[tuple[str, float]]:
  """The data sets of a Task or Mixture, and the share of examples that each gives.

  Returns:
    (name of the histories folder in DATA_DIR, rate) pairs, sorted; the rates are SeqIO's own, scaled to a sum of 1.

  Raises:
    UserError: nothing of that name is registered, a Task of it is not of a histories folder, or a folder is missing.
  """
  known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
  if name not in known:
    raise UserError(f'MIXTURE_OR_TASK_NAME = {name!r}: no such Task or Mixture; known are {", ".join(known)}.')
  provider = seqio.get_mixture_or_task(name)
  tasks = seqio.get_subtasks(provider)
  for task in tasks:
    if not isinstance(task.source, HistoriesSource):
      raise UserError(f'{name}: the Task {task.name!r} is not made of a histories folder, so it cannot be trained on.')
    task.source.require_folder()
  rates = np.array([provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1. for task in tasks])
  return [(task.source.name, float(rate)) for task, rate in zip(tasks, rates / rates.sum(), strict=True)]


def _folders(data_dir: str | os.PathLike) -> set[str]:
  """The names of the histories folders in `data_dir`."""
  files = {f'sequences.{suffix}' for suffix in ('jsonl.gz', 'jsonl', 'parquet')}
  return {name for name in storage.names(data_dir) if not name.startswith('.')  # a dot: still being written
          and not files.isdisjoint(storage.names(storage.join(data_dir, name)))}


def check_name(name: str) -> None:
  """Raises UserError where SeqIO does not allow a name."""
  if not re.fullmatch(r'[A-Za-z0-9_.]+', name):
    raise UserError(f'{name!r} cannot name a SeqIO Task or Mixture; rename it with letters, digits, "_" and ".".')


def _check_names(names: Sequence[str], mixture: str, mixed: Sequence[str], present: Collection[str]) -> None:
  for name in (*names, mixture):
    check_name(name)
  if mixture in names:
    raise UserError(f'{mixture!r} names both a data set and the mixture; rename one of them.')
  unknown = sorted(set(mixed) - set(names))
  if unknown:
    there = [name for name in names if name in present]
    raise UserError(f'The mixture {mixture!r} (inputs.mixture) names {", ".join(map(repr, unknown))}, which are not data sets; '
                    f'DATA_DIR has {", ".join(there) or "none"}.')


def make_task(source: HistoriesSource, vocabulary: TokenizerVocabulary) -> seqio.Task:
  """The Task of a data set, named as it, and not yet registered."""
  return HistoriesTask(
      source.name, source=source,
      preprocessors=[tokenize_pieces, seqio.CacheDatasetPlaceholder(), join_pieces,
                     seqio.preprocessors.append_eos_after_trim],
      output_features={'inputs': seqio.Feature(vocabulary, add_eos=False), 'targets': seqio.Feature(vocabulary)},
      metric_fns=[seqio_metrics.exact_match, seqio_metrics.log_likelihood])


def tokenize_pieces(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
  """Adds 'item_tokens' and 'item_lengths', int32: the tokens of each item's piece, and how many they are."""
  vocabulary = output_features['targets'].vocabulary

  @functools.lru_cache(maxsize=2**17)  # an item is in many histories
  def piece(text: bytes) -> np.ndarray:
    return item_tokens([text.decode()], vocabulary).tokens

  def tokenize(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pieces = [piece(text) for text in texts]
    return np.concatenate(pieces), np.array([len(tokens) for tokens in pieces], np.int32)

  def add(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    tokens, lengths = tf.numpy_function(tokenize, [example['item_texts']], (tf.int32, tf.int32))
    return example | {'item_tokens': tf.ensure_shape(tokens, [None]), 'item_lengths': tf.ensure_shape(lengths, [None])}

  return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def join_pieces(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature],
                sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
  """Makes 'inputs' and 'targets', as tokens and as text, of the prompts' and the items' pieces.

  If `sequence_length` limits the inputs, the newest whole items that fit are kept, so that the prompt of the target is
  always there; if not even the newest one fits, its end is cut.
  """
  prompts = prompt_tokens(output_features['targets'].vocabulary)
  room = (sequence_length or {}).get('inputs')

  def join(texts: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, bytes, bytes]:
    *items, target = np.split(tokens, np.cumsum(lengths)[:-1])
    if room is not None:
      newest = np.cumsum([len(item) + len(prompts.next) for item in items[::-1]]) + len(prompts.first)
      items = items[-max(int((newest <= room).sum()), 1):]
      if newest[0] > room:
        items = [items[0][:max(room - len(prompts.first) - len(prompts.next), 0)]]
    inputs_text, targets_text = text_pair([text.decode() for text in texts[-len(items) - 1:]])
    return user_tokens(items, prompts), target, inputs_text.encode(), targets_text.encode()

  def replace(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    inputs, targets, inputs_text, targets_text = tf.numpy_function(
        join, [example['item_texts'], example['item_tokens'], example['item_lengths']],
        (tf.int32, tf.int32, tf.string, tf.string))
    return {'user_id': example['user_id'],
            'inputs': tf.ensure_shape(inputs, [None]), 'targets': tf.ensure_shape(targets, [None]),
            'inputs_pretokenized': tf.ensure_shape(inputs_text, []),
            'targets_pretokenized': tf.ensure_shape(targets_text, [])}

  return dataset.map(replace, num_parallel_calls=tf.data.AUTOTUNE)
