"""Training speed: targets (spans) a second, against a plain and a strong CALRec in PyTorch (`torch_peer.py`).

Same shape, same random weights, same optimizer, same histories of up to 512 tokens, float32, on this machine's CPU. First the
losses of both sides on the same spans: where they differ by more than 1e-3 nothing counts. Then the ladder, rung by rung, the
useful operations a second over the fastest float32 product of two 2048 x 2048 matrices (measured before and after each step,
as a shared machine's speed changes), the time to compile, and that from the start of a process to its first step, with an
empty and with a warm compilation cache. Memory comes in huge pages, for both sides. The last line is JSON; `ratio` is
`targets = all` over the plain peer with one example a prefix.

  python benchmarks/train_speed.py --data_dir DATA --name scientific2018 --vocabulary vocabulary.json [--quick]

--quick: 6 layers in place of 30, one batch size of the peer (a quarter of an hour in place of one). With 30 layers the peer may
want more memory for its larger batches than there is: choose them. `pip install torch transformers` first.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_peer

from calrec_jax import configurables
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.flops import training_flops
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, RowOptions
from calrec_jax.text.corpus import Corpus, excerpts
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary
from calrec_jax.training.inputs import Inputs
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import make_train_step, new_state

LENGTH = 512  # most tokens of a history
ITEM = 64  # and of an item's text
SHAPE = 'gin/models/smollm2_135m.gin'


def product_flops(n: int = 2048, repeats: int = 5) -> dict[str, float]:
  """Operations a second of one float32 product of two n x n matrices, the best of some."""
  a, multiply = np.ones((n, n), np.float32), jax.jit(jnp.matmul)
  ours, theirs = jnp.asarray(a), torch.from_numpy(a)
  def best(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(repeats):
      begun = time.perf_counter()
      call()
      times.append(time.perf_counter() - begun)
    return 2 * n**3 / min(times)
  return {'xla': best(lambda: multiply(ours, ours).block_until_ready()), 'torch': best(lambda: theirs @ theirs)}


def prefix_corpus(corpus: Corpus, n_users: int) -> Corpus:
  """Each prefix of the first users' histories as a history of its own."""
  sizes, parts, sources = np.diff(corpus.offsets), [], []
  for user in range(min(n_users, len(sizes))):
    events = corpus.events[corpus.offsets[user]:corpus.offsets[user + 1]]
    parts += [events[:stop] for stop in range(2, len(events) + 1)]
    sources += [corpus.user_sources[user]] * max(len(events) - 1, 0)
  return dataclasses.replace(corpus, events=np.concatenate(parts), offsets=np.cumsum([0, *map(len, parts)]),
                             user_ids=[''] * len(parts), user_sources=np.asarray(sources))


class Ours:
  """One way to train: its plan, state and step."""

  def __init__(self, config: DecoderConfig, corpus: Corpus, targets: str, batch_size: int, bos: bool, contexts: int = 1):
    self.config, self.objective = config, Objective()
    self.plan = BatchPlan(corpus, batch_size=batch_size, length=LENGTH, seed=0,
                          options=RowOptions(targets=targets, row_length=contexts * LENGTH))
    self.model = TwoTower(Decoder(config), self.objective, bos=bos, longest_history=LENGTH, longest_text=ITEM + bos)
    mesh = MeshShape(1).build(jax.devices()[:1])
    transformation = Optimizer(learning_rate=1e-4).build(1000)
    self.make_state, shardings = new_state(self.model, transformation, self.plan.shapes, 0, mesh)
    step = make_train_step(self.model, transformation, mesh, shardings)
    self.state, self.step, self.done = None, step, 0

  def params(self) -> dict:
    return self.make_state().params['decoder']

  def run(self) -> tuple[float, int, float]:
    """(seconds, spans, useful operations) of the next step."""
    self.state = self.make_state() if self.state is None else self.state
    batch = self.plan.batch(self.done)
    begun = time.perf_counter()
    self.state, metrics = self.step(self.state, batch)
    spans = int(jax.block_until_ready(metrics)['spans'])
    seconds = time.perf_counter() - begun
    useful = training_flops(self.config, *self.plan.lengths(self.done))
    self.done += 1
    return seconds, spans, useful

  def measure(self, steps: int) -> dict[str, float]:
    """Speed over some steps after the first; `share` is of the product's speed around each step, the steps' median."""
    self.run()
    runs, peaks = [], [max(product_flops().values())]
    for _ in range(steps):
      runs.append(self.run())
      peaks.append(max(product_flops().values()))
    seconds, spans, useful = (np.asarray(column, float) for column in zip(*runs, strict=True))
    self.state = None
    around = (np.asarray(peaks[:-1]) + np.asarray(peaks[1:])) / 2
    return {'spans_per_second': spans.sum() / seconds.sum(), 'flops': useful.sum() / seconds.sum(), 'peak': np.median(around),
            'share': np.median(useful / seconds / around),
            **{k: v for k, v in self.plan.report.items() if k.endswith('_fill')}}


def their_speed(peer: torch_peer.Peer, found: list[torch_peer.Example], size: int, steps: int) -> float:
  """Spans a second of batches of a size, after one that is not timed."""
  order = np.random.default_rng(0).permutation(len(found))
  batches = [[found[i] for i in order[start:start + size]] for start in range(0, (steps + 1) * size, size)]
  peer.step(batches[0])
  begun = time.perf_counter()
  for batch in batches[1:]:
    peer.step(batch)
  return size * steps / (time.perf_counter() - begun)


def their_operations(config: DecoderConfig, found: list[torch_peer.Example]) -> float:
  """Useful operations a span where each prefix is written out: no padding, head at targets."""
  targets = np.asarray([len(example.target) for example in found])
  histories = np.asarray([len(example.history) for example in found])
  return training_flops(config, np.concatenate([histories + targets, targets]), int((targets + 1).sum())) / len(found)


def largest_difference(ours: Ours, params: dict, peers: list[torch_peer.Peer]) -> float:
  """Of the loss terms of one batch, spans and weights being the same."""
  layout = ours.plan.layout(0)
  metrics = ours.model.apply({'params': {'decoder': params}}, ours.plan.batch(0))[1]
  batch = torch_peer.examples(ours.plan.corpus, ours.plan.excerpts, np.concatenate(layout.rows))
  assert len(batch) == int(metrics['spans'])
  found = []
  for peer in peers:
    with torch.no_grad():
      found += [abs(float(term) - float(metrics[name])) for name, term in
                zip(('nig', 'tt', 'ut'), peer.losses(batch), strict=True)]
  return max(found)


def compile_seconds(config: DecoderConfig, corpus: Corpus, bos: bool) -> float:
  """Of one step, without the compilation cache."""
  ours = Ours(config, corpus, 'all', 2, bos)
  state, batch = jax.eval_shape(ours.make_state), ours.plan.batch(0)
  jax.clear_caches()
  begun = time.perf_counter()
  ours.step.lower(state, batch).compile()
  return time.perf_counter() - begun


def start_up_seconds(options: argparse.Namespace, cache: str) -> float:
  """From the start of a process to the end of its first step."""
  command = [sys.executable, *sys.argv, '--start_up', str(time.time())]
  done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                        env=os.environ | {'JAX_COMPILATION_CACHE_DIR': cache})
  return float(done.stdout.splitlines()[-1])


def told(name: str, value: float) -> float:
  print(f'{name:<72} {value:8.2f} spans/s', flush=True)
  return value


def their_speeds(ours: Ours, options: argparse.Namespace, eos: int) -> tuple[dict[str, float], dict[str, float], float]:
  """(spans a second of both peers, useful operations a span of theirs, largest difference of a loss from ours)."""
  corpus, params, speed, operations = ours.plan.corpus, ours.params(), {}, {}
  plain, strong = (torch_peer.Peer(ours.config, params, ours.objective, eos, strong) for strong in (False, True))
  difference = largest_difference(Ours(ours.config, corpus, 'all', 2, ours.model.bos), params, [plain, strong])
  print(f'losses differ by at most {difference:.1e}', flush=True)
  assert difference < 1e-3, 'the two sides do not compute the same losses: no ratio counts'
  sample = np.random.default_rng(1)
  for targets in ('last', 'all'):
    cut = excerpts(corpus, length=LENGTH, targets=targets, context_items=4)
    found = torch_peer.examples(corpus, cut, sample.permutation(len(cut))[:300])
    operations[targets] = their_operations(ours.config, found)
    speed[f'plain, {targets}'] = max(
        told(f'plain PyTorch, targets = {targets}, one example a prefix, batches of {size}',
             their_speed(plain, found, size, max(1, options.steps * 8 // size))) for size in options.peer_batch_sizes)
    speed[f'strong, {targets}'] = told(
        f'strong PyTorch, targets = {targets}: nothing padded, head at targets',
        their_speed(strong, found, 8, options.steps))
  return speed, operations, difference


def our_speeds(ours: Ours, options: argparse.Namespace) -> dict[str, dict[str, float]]:
  """The rungs of the ladder, each as `Ours.measure` has it."""
  corpus, found = ours.plan.corpus, {}
  def last(corpus: Corpus) -> Ours:  # in rows of two contexts: a history and its one target often take more than half of one
    return Ours(ours.config, corpus, 'last', options.batch_size // 2, ours.model.bos, contexts=2)
  rungs = {'prefixes': ('every prefix an example: compiled, packed, head at targets',
                        lambda: last(prefix_corpus(corpus, 2000))),
           'last': ('targets = last', lambda: last(corpus)),
           'all': ('targets = all: all prefixes in one pass', lambda: ours)}
  for name, (text, run) in rungs.items():
    if name != 'all' and options.ours_only:
      continue
    found[name] = run().measure(options.steps)
    told(f'ours, {text}', found[name]['spans_per_second'])
    print('  useful operations: {:.0f} GFLOP/s, {:.1%} of the product around each step (median {:.0f}); joint {:.1%}, alone '
          '{:.1%} tokens'.format(found[name]['flops'] / 1e9, found[name]['share'], found[name]['peak'] / 1e9,
                                 found[name]['joint_fill'], found[name]['alone_fill']), flush=True)
  return found


def main() -> None:
  options = parsed()
  if 'GLIBC_TUNABLES' not in os.environ:  # is read when a process starts
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.argv])
  configurables.parse([SHAPE], [], [])
  config = gin.get_configurable('calrec.decoder')()
  if options.quick:
    config = dataclasses.replace(config, n_layers=6)
  vocabulary = load_vocabulary(pathlib.Path(options.vocabulary))
  inputs = Inputs(data_dir=options.data_dir, mixture_or_task_name=options.name, vocabulary=vocabulary, template=ItemTemplate(),
                  task_feature_lengths={'inputs': LENGTH - ITEM, 'targets': ITEM})
  corpus, bos = inputs.corpus(inputs.load(), 'train'), vocabulary.bos_id is not None
  ours = Ours(config, corpus, 'all', options.batch_size, bos)
  if options.start_up:
    ours.run()
    print(time.time() - options.start_up)
    return
  peaks = product_flops()
  print(f'product of 2048 x 2048: XLA {peaks["xla"] / 1e9:.0f}, torch {peaks["torch"] / 1e9:.0f} GFLOP/s', flush=True)
  result = {'name': 'train_speed', 'layers': config.n_layers}
  if options.ours_only:
    share = round(our_speeds(ours, options)['all']['share'], 3)
    print(json.dumps(result | {'peer': 'the fastest float32 product', 'ratio': share}))
    return
  speed, operations, difference = their_speeds(ours, options, vocabulary.eos_id)
  found = our_speeds(ours, options)
  speed |= {f'ours, {name}': of['spans_per_second'] for name, of in found.items()}
  a_span = found['all']['flops'] / found['all']['spans_per_second']
  bound = found['all']['peak'] / a_span
  print(f'useful operations a span, targets = all: {a_span / 1e9:.0f} G here, {operations["all"] / 1e9:.0f} G with prefixes '
        f'written out; with no other cost than these, at the speed of the product: {bound:.1f} spans/s', flush=True)
  compiled = {layers: compile_seconds(dataclasses.replace(config, n_layers=layers), corpus, bos) for layers in (6, 30)}
  print(f'compile: {compiled[6]:.1f} s for 6 layers, {compiled[30]:.1f} s for 30', flush=True)
  with tempfile.TemporaryDirectory() as cache:
    start_up = {name: start_up_seconds(options, cache) for name in ('empty', 'warm')}
  print(f'start of a process to the end of its first step: {start_up["empty"]:.0f} s with an empty compilation cache, '
        f'{start_up["warm"]:.0f} s with a warm one', flush=True)
  print(json.dumps(result | {
      'peer': 'plain PyTorch with transformers', 'ratio': round(speed['ours, all'] / speed['plain, all'], 2),
      'last_over_plain': round(speed['ours, last'] / speed['plain, last'], 2),
      'all_over_strong': round(speed['ours, all'] / speed['strong, all'], 2),
      'useful_share_of_peak': round(found['all']['share'], 3),
      'ratio_at_a_share_of_one': round(bound / speed['plain, all'], 2),
      'all_over_strong_at_a_share_of_one': round(bound / speed['strong, all'], 2), 'losses_differ_by': difference,
      'compile_30_over_6': round(compiled[30] / compiled[6], 2),
      'first_step_seconds': {name: round(seconds, 1) for name, seconds in start_up.items()},
      'spans_per_second': {name: round(value, 3) for name, value in speed.items()}}))


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data_dir', required=True, help='holds the histories folder')
  parser.add_argument('--name', required=True, help='of the data set')
  parser.add_argument('--vocabulary', required=True, help='vocabulary.json of SmolLM2, see `calrec import`')
  parser.add_argument('--batch_size', type=int, default=16, help='rows of ours; half as many where they are twice as long')
  parser.add_argument('--peer_batch_sizes', type=int, nargs='+', help='the best counts (default: 4 8 16 32, with --quick 8)')
  parser.add_argument('--steps', type=int, default=3, help='of each measurement')
  parser.add_argument('--quick', action='store_true', help='6 layers')
  parser.add_argument('--ours_only', action='store_true', help='the useful share of the peak alone, without the peers')
  parser.add_argument('--start_up', type=float, help=argparse.SUPPRESS)  # when the process was begun
  options = parser.parse_args()
  options.peer_batch_sizes = options.peer_batch_sizes or ([8] if options.quick else [4, 8, 16, 32])
  return options


if __name__ == '__main__':
  main()
