"""Constrained beam search: the time of a step against that of a step of free sampling, both with 32 texts of one user.

A step of free sampling is `read_tokens` and `_draw`, with 32 branches that all differ (nothing is saved by sharing). A step of
the beam is all of it: the best children of 32 beams on the trie of a real catalogue, suffixes that follow their beams, the
host's part, and `read_tokens`. Both have the weights of one checkpoint (such as SmolLM2-135M), float32, on this machine's CPU,
read the same prefixes of 512 real tokens, and have room for suffixes of 64. They take turns, user by user. `ratio` compares the
medians of steps with 32 branches, `mean_ratio` the means of all steps of a search, which has fewer branches at first, and at
last, when texts have ended. The last line is JSON.

  python benchmarks/constrained_speed.py --checkpoint SMOLLM2 --data HISTORIES_FOLDER [--quick]

--quick: two users instead of eight.
"""

import argparse
import json
import time

import jax
import numpy as np
from infer_speed import PREFIX, real_prefixes

from calrec_jax.data import histories
from calrec_jax.inference import constrained, loading, sampling
from calrec_jax.inference.trie import build_trie
from calrec_jax.models import decoding
from calrec_jax.text.item_tokens import load_item_tokens

WIDTH, MAX_ITEM_TOKENS, TEMPERATURE = 32, 64, 0.5


class Clock:
  """The seconds between the calls of `advance` in a search, and how many branches each had."""

  def __init__(self):
    self.starts, self.branches, self._advance = [], [], sampling.advance
    constrained.advance = self

  def __call__(self, *args):
    self.starts.append(time.perf_counter())
    self.branches.append(len(args[6]))
    return self._advance(*args)

  def steps(self) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, branches) of the steps since the last time; the first call has no step before it, the last none after it."""
    seconds, branches = np.diff(self.starts), np.asarray(self.branches[:-1])
    self.starts, self.branches = [], []
    return seconds, branches


def sampling_steps(loaded: loading.Loaded, prefix: decoding.Prefix, n_steps: int) -> np.ndarray:
  """Seconds of each step of 32 branches that differ."""
  decoder, params = loaded.decoder, loaded.by_layer
  keys, allowed_V = jax.numpy.asarray([[0, 1]], 'uint32'), jax.numpy.ones(decoder.config.vocab_size, bool)
  draw = lambda hidden_BD, place: np.asarray(sampling._draw(
      decoder, params, keys, allowed_V, WIDTH, TEMPERATURE, 1.0, hidden_BD, np.arange(WIDTH)[None], np.int32(place))[0])[0]
  suffix, times = decoding.empty_suffix(decoder, WIDTH, MAX_ITEM_TOKENS), []
  users_B, tokens_B, parents_B = np.zeros(WIDTH, int), np.arange(1000, 1000 + WIDTH), None  # all differ
  for place in range(n_steps):
    begun = time.perf_counter()
    hidden_BD, suffix = sampling.advance(decoder, params, prefix, suffix, parents_B, tokens_B, users_B, WIDTH, place)
    tokens_B, parents_B = draw(hidden_BD, place + 1), np.arange(WIDTH)
    times.append(time.perf_counter() - begun)
  return np.asarray(times)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--quick', action='store_true')
  options = parser.parse_args()
  loaded, data = loading.load(options.checkpoint, dtype='float32'), histories.load(options.data)
  begun = time.perf_counter()
  trie = build_trie(load_item_tokens(options.data, data, loaded.template, loaded.vocabulary), max_item_tokens=MAX_ITEM_TOKENS,
                    eos_id=loaded.vocabulary.eos_id)
  print(f'trie of {trie.n_texts} texts: {len(trie.lows_N)} nodes, {time.perf_counter() - begun:.2f} s')
  on_device, clock = constrained.on_device(trie), Clock()
  prefill = jax.jit(lambda params, tokens_UP, lengths_U: decoding.prefill(
      loaded.decoder, params, tokens_UP, lengths_U, bos=False))
  beams, branches, samples, searches = [], [], [], []
  tokens_UP = real_prefixes(loaded, options.data, 2 if options.quick else 8)
  for round_number in range(2):  # the first compiles
    for user, tokens_P in enumerate(tokens_UP):
      prefix = jax.block_until_ready(prefill(loaded.by_layer, tokens_P[None], np.full(1, PREFIX, np.int32)))
      begun = time.perf_counter()
      found = constrained.beam_search(loaded.decoder, loaded.by_layer, prefix, on_device, width=WIDTH, eos_id=trie.eos_id)
      searches.append(time.perf_counter() - begun)
      seconds, of_steps = clock.steps()
      assert (found.texts_UK >= 0).all(), found
      if round_number:
        beams.append(seconds)
        branches.append(of_steps)
        samples.append(sampling_steps(loaded, prefix, MAX_ITEM_TOKENS))
        print(f'user {user}: {len(seconds)} steps of the beam, {seconds.mean() * 1e3:.1f} ms each, '
              f'{of_steps.mean():.1f} branches; a step of sampling {samples[-1].mean() * 1e3:.1f} ms')
      elif user == 0:
        sampling_steps(loaded, prefix, 3)
  beams, branches, samples = map(np.concatenate, (beams, branches, samples))
  whole = beams[branches == WIDTH]
  result = {'name': 'constrained_speed', 'ratio': np.median(whole) / np.median(samples), 'width': WIDTH, 'prefix': PREFIX,
            'mean_ratio': beams.mean() / samples.mean(), 'beam_step_ms': 1e3 * np.median(whole),
            'sampling_step_ms': 1e3 * np.median(samples), 'full_steps': len(whole), 'steps': len(beams),
            'mean_branches': branches.mean(), 'search_seconds': np.mean(searches[len(tokens_UP):]),
            'items': len(trie.texts_I)}
  print(json.dumps({key: round(float(value), 4) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == '__main__':
  main()
