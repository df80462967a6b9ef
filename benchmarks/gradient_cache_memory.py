"""Gradient caching: a global batch of 2,048 spans in 8 and in 32 microbatches, against one microbatch trained by itself.

The peer is a plain step on a batch of one microbatch's size. The ratio is the peak memory of the cached step over the peer's,
the worse of 8 and 32: of the compiled programs (arguments, results and temporaries), and of the processes that run them
(peak resident memory). And with a decoder that is small enough, the gradient of both is compared with the whole batch's.

  python benchmarks/gradient_cache_memory.py --data_dir DATA --name scientific2018 --vocabulary vocabulary.json [--quick]

A quarter of an hour on two CPU cores, for 6 layers of SmolLM2's shape; `--quick` measures a tiny decoder. Prints one JSON
object as its last line.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import subprocess
import sys

import gin
import jax
import numpy as np
import optax

from calrec_jax import configurables
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.text.corpus import Corpus
from calrec_jax.text.rows import Shapes
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary
from calrec_jax.training.inputs import Inputs
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import make_train_step, new_state

SPANS = 2048
LENGTHS = {'inputs': 496, 'targets': 16}  # short items, many targets a row
MICROBATCHES = (8, 32)


def first_batch(corpus: Corpus, rows: int) -> tuple[Shapes, dict[str, np.ndarray], int]:
  """(its sizes, its arrays, its spans)."""
  plan = BatchPlan(corpus, batch_size=rows, length=sum(LENGTHS.values()), options=RowOptions(window_steps=2), seed=0)
  batch = plan.batch(0)
  return plan.shapes, batch, int((batch['span_texts'] > 0).sum())


class Step:
  """A step on the first batch, in microbatches; its optimizer keeps the gradient."""

  def __init__(self, config: DecoderConfig, corpus: Corpus, rows: int, microbatches: int):
    shapes, self.batch, self.spans = first_batch(corpus, rows)
    model, mesh = TwoTower(Decoder(config), Objective(alpha=0.3, beta=0.2)), MeshShape(1).build(jax.devices()[:1])
    self.make_state, shardings = new_state(model, optax.trace(0.0), shapes, 0, mesh)
    self.step = make_train_step(model, optax.trace(0.0), mesh, shardings, microbatches=microbatches)

  def compiled_bytes(self) -> int:
    memory = self.step.lower(jax.eval_shape(self.make_state), self.batch).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes)

  def run(self) -> tuple[dict, list[np.ndarray]]:
    """The metrics, and the gradient."""
    state, metrics = self.step(self.make_state(), self.batch)
    return jax.device_get((metrics, jax.tree.leaves(state.opt_state.trace)))


def rows_for(corpus: Corpus) -> int:
  """The least multiple of 32 rows whose first batch holds `SPANS` spans."""
  for rows in range(32, 1024, 32):
    if first_batch(corpus, rows)[2] >= SPANS:
      return rows
  raise SystemExit(f'No batch of up to 1,024 rows holds {SPANS} spans.')


def largest_difference(config: DecoderConfig, corpus: Corpus, rows: int) -> float:
  """Of the cached gradients from the whole batch's, relative to each leaf's largest entry."""
  _, whole = Step(config, corpus, rows, 1).run()
  return max(float(np.abs(found - leaf).max() / np.abs(leaf).max()) for n in MICROBATCHES
             for found, leaf in zip(Step(config, corpus, rows, n).run()[1], whole, strict=True))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True, help='holds the histories folder')
  parser.add_argument('--name', required=True, help='of the data set')
  parser.add_argument('--vocabulary', required=True)
  parser.add_argument('--quick', action='store_true', help='a tiny decoder')
  parser.add_argument('--run', nargs=2, type=int, help=argparse.SUPPRESS)  # rows and microbatches, in a process of their own
  options = parser.parse_args()
  vocabulary = load_vocabulary(pathlib.Path(options.vocabulary))
  def decoder(file: str, **changes: int) -> DecoderConfig:
    configurables.parse([file], [], [])
    return dataclasses.replace(gin.get_configurable('calrec.decoder')(), vocab_size=-(-vocabulary.vocab_size // 128) * 128,
                               **changes)
  tiny = decoder('gin/models/tiny.gin')
  config = tiny if options.quick else decoder('gin/models/smollm2_135m.gin', n_layers=6)
  inputs = Inputs(data_dir=options.data_dir, mixture_or_task_name=options.name, vocabulary=vocabulary, template=ItemTemplate(),
                  task_feature_lengths=LENGTHS)
  corpus = inputs.corpus(inputs.load(), 'train')
  if options.run:
    step = Step(config, corpus, *options.run)
    step.run()
    print(json.dumps({'process': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 'spans': step.spans,
                      'compiled': step.compiled_bytes()}))
    return

  def measured(rows: int, microbatches: int) -> dict[str, int]:
    done = subprocess.run([sys.executable, *sys.argv, '--run', str(rows), str(microbatches)], check=True, text=True,
                          stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f'{rows:4} rows, {found["spans"]:5} spans, {microbatches:2} microbatches: compiled {found["compiled"] / 1e9:.2f} GB, '
          f'process {found["process"] / 1e9:.2f} GB', flush=True)
    return found
  rows, ratios, spans = rows_for(corpus), {}, 0
  for n in MICROBATCHES:
    cached, alone = measured(rows, n), measured(rows // n, 1)
    spans = cached['spans']
    ratios[n] = {kind: round(cached[kind] / alone[kind], 3) for kind in ('compiled', 'process')}
  difference = largest_difference(tiny, corpus, rows)
  print(f'gradients differ by at most {difference:.1e} of their largest entry')
  print(json.dumps({'name': 'gradient_cache_memory', 'peer': "a plain step on one microbatch's rows", 'spans': spans,
                    'ratio': max(max(found.values()) for found in ratios.values()), 'ratios': ratios,
                    'gradients_differ_by': difference}))


if __name__ == '__main__':
  main()
