"""A tiny store for tests: two data sets, a vocabulary, and a decoder that compiles in a moment."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from calrec_jax.data import histories
from calrec_jax.data.histories import Histories
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.text.batches import RowOptions
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary, template_phrases, train_vocabulary
from calrec_jax.training import trainer
from calrec_jax.training.inputs import Inputs
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.trainer import Schedule

# Of a child process that may be killed or cut short: an entry of the compilation cache that is half-written keeps jax from
# writing any other. It only reads them.
READS_CACHE = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1e9'}
NAMES = ('books', 'games')
LENGTHS = {'inputs': 44, 'targets': 20}  # rows of 64 tokens
# Sizes that a `model` axis of 4 and an `fsdp` axis of 8 divide.
DECODER = DecoderConfig(n_layers=2, embed_dim=32, n_heads=8, n_kv_heads=4, head_dim=4, ff_dim=64)
DECODER_GIN = ['decoder.n_layers=2', 'decoder.embed_dim=32', 'decoder.n_heads=8', 'decoder.n_kv_heads=4',
               'decoder.head_dim=4', 'decoder.ff_dim=64']
OBJECTIVE = Objective(alpha=0.3, beta=0.2)


def make_histories(name: str, *, users: int = 40, items: int = 16, seed: int = 0) -> Histories:
  """Users who mostly buy an item and then the next one."""
  rng = np.random.default_rng(seed)
  fields = [{'title': f'{name} {"abcdefgh"[item % 8]}{item // 8}', 'category': 'red' if item % 2 else '', 'brand': 'o',
             'price': f'${item % 4}'} for item in range(items)]
  lengths = rng.integers(4, 9, users)
  starts, jumps = rng.integers(0, items, users), rng.integers(1, 3, (users, 9))
  walks = [(start + np.cumsum(jump))[:length] % items for start, jump, length in zip(starts, jumps, lengths, strict=True)]
  return Histories(name, [f'{name}{user:03}' for user in range(users)], [f'{name}-{item}' for item in range(items)],
                   fields, np.cumsum([0, *lengths]).astype(np.int64), np.concatenate(walks).astype(np.int32))


def write_store(folder: pathlib.Path) -> pathlib.Path:
  """Writes `folder/data/<name>/` and `folder/vocabulary.json`; returns `folder`."""
  texts = []
  for seed, name in enumerate(NAMES):
    data = make_histories(name, seed=seed, users=40 - 10 * seed)
    place = folder / 'data' / name
    place.mkdir(parents=True)
    histories.write(place, data, {})
    texts += [ItemTemplate().item_text(item) for item in data.items]
  train_vocabulary(texts, size=320, phrases=template_phrases(ItemTemplate())).save(folder / 'vocabulary.json')
  return folder


def inputs(store: pathlib.Path, name: str = 'stage1_mixture', **changes: Any) -> Inputs:
  """What a run on the store reads."""
  options = {'data_dir': str(store / 'data'), 'mixture_or_task_name': name, 'template': ItemTemplate(),
             'vocabulary': load_vocabulary(store / 'vocabulary.json'), 'task_feature_lengths': LENGTHS}
  return Inputs(**options | changes)


def train(store: pathlib.Path, model_dir: pathlib.Path, **changes: Any) -> dict[str, float]:
  """`trainer.train` with tiny options; `changes` replace them."""
  options = {
      'model_dir': str(model_dir), 'train_steps': 6, 'batch_size': 8, 'inputs': inputs(store), 'decoder': DECODER,
      'objective': OBJECTIVE, 'rows': RowOptions(window_steps=4), 'optimizer': Optimizer(warmup_steps=2),
      'mesh': MeshShape(), 'schedule': Schedule(log_every=1, eval_every=0, save_every=2)}
  return trainer.train(**options | changes)


def scalars(model_dir: pathlib.Path, prefix: str = '') -> dict[tuple[str, int], float]:
  """(name, step) to value of all TensorBoard scalars of a run; of two that were written, the later one."""
  import tensorflow as tf
  from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
  found = {}
  for file in sorted(pathlib.Path(model_dir).glob('events.out.tfevents.*')):
    for event in EventFileLoader(str(file)).Load():
      for value in event.summary.value:
        if value.tag.startswith(prefix):
          found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
  return found


def gin_arguments(store: pathlib.Path, stage: str, model_dir: pathlib.Path, *more: str, steps: int = 2) -> list[str]:
  """`calrec train` on the store, a few steps of the tiny decoder; the model gin is not read: its bindings are given."""
  bindings = [f"MODEL_DIR='{model_dir}'", f"DATA_DIR='{store / 'data'}'", f"VOCABULARY='{store / 'vocabulary.json'}'",
              f'TRAIN_STEPS={steps}', 'BATCH_SIZE=8', f'TASK_FEATURE_LENGTHS={LENGTHS}', 'rows.window_steps=4', *DECODER_GIN]
  return ['train', f'--gin_file=gin/runs/{stage}.gin', *gin(bindings), *more]


def gin(bindings: Sequence[str]) -> list[str]:
  return [f'--gin.{binding}' for binding in bindings]
