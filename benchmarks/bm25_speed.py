"""The BM25 ranker: 32 generated texts of a user become one score for every item; and an index that grows.

The peers are `rank_bm25`, the plain implementation, and bare `bm25s` retrieval of the best 100 items of each text, which
is less work: no score for every item, no fusion, no bit-exact ties. bm25s runs with the fastest of its ways that this machine
has (numpy or numba, one thread or all; its `get_scores` too), and both peers get the texts as words, while our time includes
taking them apart. All three compute BM25+ (k1 1.5, b 0.75, delta 0.5), the variant that they share: rank_bm25's BM25Plus. Their
scores are compared before anything is timed. The default, Lucene's BM25, is timed against bm25s beside it.

The texts of a user are texts of the catalogue's items with one word in five replaced. The index that grows holds 100,000 such
texts and gets 1 % more; the peer is an index built of all of them.

  python benchmarks/bm25_speed.py --data HISTORIES_FOLDER [--quick]

A minute on two CPU cores; `--quick` (half of it) takes fewer users, and 20,000 items in place of 100,000. `numba` is taken if
installed. Prints one JSON object as its last line: `ratio` is rank_bm25's time over ours, `of_bm25s` our time over bm25s's,
`grow` the time of adding 1 % over that of building anew.
"""

import argparse
import functools
import importlib.util
import json
import logging
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
import rank_bm25

from calrec_jax.data import histories
from calrec_jax.ranking.bm25 import LUCENE, Bm25, Bm25Options
from calrec_jax.ranking.fusion import quasi_round_robin
from calrec_jax.text.templates import ItemTemplate

TEXTS = 32  # a user's
BEST = 100
PLUS = Bm25Options(method='bm25+')


def seconds(call: Callable, inputs: Sequence) -> float:
  """The median over the inputs, after one call that is not timed."""
  taken = []
  for number, value in enumerate([inputs[0], *inputs]):
    begun = time.perf_counter()
    call(value)
    if number:
      taken.append(time.perf_counter() - begun)
  return statistics.median(taken)


def altered(texts: list[str], n: int, rng: np.random.Generator) -> list[str]:
  """`n` of the texts, one word in five replaced by a word of another text."""
  chosen = [texts[number].split(' ') for number in rng.integers(len(texts), size=n)]
  others = [word for text in texts for word in text.split(' ')]
  return [' '.join(word if keep else others[rng.integers(len(others))] for word, keep in
                   zip(words, rng.random(len(words)) > 0.2, strict=True)) for words in chosen]


def ranked(index: Bm25, logprobs_G: np.ndarray, texts: list[str]) -> np.ndarray:
  return quasi_round_robin(index.scores(texts), logprobs_G)


def bm25s_ways(words: list[list[str]], options: Bm25Options) -> dict[str, Callable]:
  """Name to a call that takes a user's texts as words."""
  ways = {}
  for backend in ('numpy', 'numba'):
    if importlib.util.find_spec(backend):
      index = bm25s.BM25(method=options.method, k1=options.k1, b=options.b, delta=options.delta, backend=backend)
      index.index(words, show_progress=False)
      for threads in (0, os.cpu_count()):
        ways[f'{backend}, retrieve, {threads or 1} thread(s)'] = functools.partial(
          index.retrieve, k=BEST, show_progress=False, n_threads=threads)
      ways[f'{backend}, get_scores'] = lambda texts, index=index: np.stack([index.get_scores(text) for text in texts])
  return ways


def against_bm25s(texts: list[str], users: list[list[str]], options: Bm25Options) -> tuple[float, float]:
  """(our seconds a user, those of bm25s's fastest way)."""
  index, ways = Bm25(texts, options), bm25s_ways([options.words(text) for text in texts], options)
  words = [[options.words(text) for text in user] for user in users]
  error = abs(index.scores(users[0]) - ways['numpy, get_scores'](words[0])).max()
  assert error < 1e-4, error
  taken = {way: seconds(call, words) for way, call in ways.items()}
  fastest = min(taken, key=taken.get)
  logprobs_G = -20 * np.random.default_rng(1).random(TEXTS)
  ours = seconds(functools.partial(ranked, index, logprobs_G), users)
  print(f'{options.method}: {1e3 * ours:.2f} ms a user; bm25s {1e3 * taken[fastest]:.2f} ms ({fastest}), '
        f'we take {ours / taken[fastest]:.2f} of it; scores differ by {error:.0e}')
  print('  bm25s: ' + '; '.join(f'{way} {1e3 * time_:.2f} ms' for way, time_ in taken.items()))
  return ours, taken[fastest]


def rank_bm25_seconds(texts: list[str], users: list[list[str]]) -> float:
  index = rank_bm25.BM25Plus([PLUS.words(text) for text in texts], k1=PLUS.k1, b=PLUS.b, delta=PLUS.delta)
  words = [[PLUS.words(text) for text in user] for user in users]
  # What a user's texts cost is the sum over them: the first text alone is enough for the comparison.
  error = abs(Bm25(texts, PLUS).scores(users[0][:1])[0] - index.get_scores(words[0][0])).max()
  assert error < 1e-4, error
  print(f'{PLUS.method}: scores differ from BM25Plus of rank_bm25 by {error:.0e}')
  return seconds(lambda user: [index.get_scores(text) for text in user], words)


def grown(texts: list[str], n_items: int) -> dict[str, float]:
  """Seconds of an index of `n_items`: to build it with 1 % more, to add the 1 %, to load it."""
  rng = np.random.default_rng(2)
  old, new = altered(texts, n_items, rng), altered(texts, n_items // 100, rng)
  index, queries = Bm25(old), altered(texts, TEXTS, rng)
  scores_GI = Bm25([*old, *new]).scores(queries)
  np.testing.assert_array_equal(index.with_items(new).scores(queries), scores_GI)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'index.npz'
    index.with_items(new).save(path)
    np.testing.assert_array_equal(Bm25.load(path).scores(queries), scores_GI)
    taken = {'build': seconds(Bm25, [[*old, *new]] * 3), 'add': seconds(index.with_items, [new] * 9),
             'load': seconds(Bm25.load, [path] * 5)}
    size = path.stat().st_size
  print(f'{n_items} items and 1 % more: built anew in {taken["build"]:.3f} s, added in {taken["add"]:.3f} s '
        f'({taken["add"] / taken["build"]:.1%}), loaded in {taken["load"]:.3f} s ({size / 2**20:.1f} MiB)')
  return taken


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', required=True, help='a histories folder')
  parser.add_argument('--quick', action='store_true', help='fewer users and items')
  arguments = parser.parse_args()
  logging.getLogger('bm25s').setLevel(logging.INFO)
  texts = [ItemTemplate().item_text(item) for item in histories.load(pathlib.Path(arguments.data)).items]
  rng = np.random.default_rng(0)
  users = [altered(texts, TEXTS, rng) for _ in range(8 if arguments.quick else 40)]
  print(f'{len(texts)} items, {len(users)} users of {TEXTS} texts each; medians')
  plus, peer_plus = against_bm25s(texts, users, PLUS)
  lucene, peer_lucene = against_bm25s(texts, users, LUCENE)
  slow = rank_bm25_seconds(texts, users[:1 if arguments.quick else 3])
  print(f'{PLUS.method}: rank_bm25 {1e3 * slow:.0f} ms a user, {slow / plus:.0f} times ours')
  growth = grown(texts, 20_000 if arguments.quick else 100_000)
  print(json.dumps({
    'name': 'bm25_speed', 'peer': 'rank_bm25 (BM25Plus), and the fastest way of bm25s', 'ratio': round(slow / plus, 1),
    'of_bm25s': round(plus / peer_plus, 2), 'of_bm25s_lucene': round(lucene / peer_lucene, 2),
    'grow': round(growth['add'] / growth['build'], 4), 'ms_a_user': round(1e3 * plus, 2),
    **{f'{name}_seconds': round(taken, 4) for name, taken in growth.items()}}))


if __name__ == '__main__':
  main()
