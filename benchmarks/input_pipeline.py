"""The input pipeline alone: tokens a second of packed batches, from the first batch of the first epoch on.

The peer is the pipeline that one would write first: each history's text is put together and tokenized when it is needed, by the
same vocabulary, and padded to a row. Building the item token table, which is done once for a data set and a vocabulary, is
reported beside it. The ratio is our tokens a second over the peer's.

  python benchmarks/input_pipeline.py --data_dir DATA --name games2018 --vocabulary vocabulary.json [--quick]

Two minutes on two CPU cores; `--quick` takes 64 batches in place of an epoch. Prints one JSON object as its last line.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

from calrec_jax.data import histories
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.text.item_tokens import load_item_tokens
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate
from calrec_jax.text.vocabularies import TokenizerVocabulary, load_vocabulary
from calrec_jax.training.inputs import Inputs

LENGTH, ROWS = 1024, 16


def seconds(call) -> float:
  begun = time.perf_counter()
  call()
  return time.perf_counter() - begun


def peer_tokens_per_second(data: histories.Histories, vocabulary: TokenizerVocabulary, n_users: int) -> float:
  """Of the joint rows of the first users, in batches of `ROWS`."""
  texts, counted, begun = [ItemTemplate().item_text(item) for item in data.items], 0, time.perf_counter()
  for start in range(0, n_users, ROWS):
    batch = np.zeros((ROWS, LENGTH), np.int32)
    for row, user in enumerate(range(start, min(start + ROWS, n_users))):
      events = data.events[data.offsets[user]:data.offsets[user + 1]]
      tokens = vocabulary.encode(''.join(f'{NEXT if i else FIRST} {texts[item]}' for i, item in enumerate(events)))[-LENGTH:]
      batch[row, :len(tokens)] = tokens
      counted += len(tokens)
  return counted / (time.perf_counter() - begun)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True, help='holds the histories folder')
  parser.add_argument('--name', required=True, help='of the data set')
  parser.add_argument('--vocabulary', required=True)
  parser.add_argument('--quick', action='store_true', help='64 batches')
  options = parser.parse_args()
  vocabulary = load_vocabulary(pathlib.Path(options.vocabulary))
  data = histories.load(pathlib.Path(options.data_dir) / options.name)
  with tempfile.TemporaryDirectory() as empty:
    table = seconds(lambda: load_item_tokens(empty, data, ItemTemplate(), vocabulary))
  inputs = Inputs(data_dir=options.data_dir, mixture_or_task_name=options.name, vocabulary=vocabulary, template=ItemTemplate(),
                  task_feature_lengths={'inputs': LENGTH - 64, 'targets': 64})
  sources = inputs.load()
  begun = time.perf_counter()
  plan = BatchPlan(inputs.corpus(sources, 'train'), batch_size=ROWS, length=LENGTH, options=RowOptions(), seed=0)
  planned = time.perf_counter() - begun
  epoch = int(plan.excerpts.tokens.sum() / plan.window_tokens * plan.options.window_steps)
  counted, n_steps = 0, 64 if options.quick else epoch
  begun = time.perf_counter()
  for step in range(n_steps):
    batch = plan.batch(step)
    counted += int((batch['segments'] > 0).sum() + (batch['alone_segments'] > 0).sum())
  took = time.perf_counter() - begun
  ours, with_planning = counted / took, counted / (took + planned)
  peer = peer_tokens_per_second(data, vocabulary, 256 if options.quick else 4096)
  print(f'item token table, {len(data.items)} items: {table:.2f} s; corpus and first window: {planned:.2f} s')
  print(f'{n_steps} batches ({n_steps / epoch:.0%} of the first epoch): {ours:,.0f} tokens/s, {with_planning:,.0f} with the '
        f'corpus and the first window; the peer {peer:,.0f}')
  print(json.dumps({'name': 'input_pipeline', 'peer': 'histories tokenized when they are needed, and padded',
                    'ratio': round(ours / peer, 1), 'tokens_per_second': round(ours),
                    'tokens_per_second_from_cold': round(with_planning), 'table_seconds': round(table, 2)}))


if __name__ == '__main__':
  main()
