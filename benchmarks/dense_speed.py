"""Dense retrieval alone: the exact best 10 of a whole catalogue for batches of users, against what the machine can do.

A search has to read each text once and to multiply it with each user. The bound is the longer of the two: the bytes of the
texts at the speed at which JAX sums them up, or the multiplications at that of a product of two 2048 x 2048 matrices, both
measured in the same run. The share is the bound's seconds over ours. The peer multiplies with NumPy and takes
`np.argpartition`; its ratio is its seconds over ours.

  python benchmarks/dense_speed.py [--quick]

A million texts of 576 numbers (2.3 GB, held twice); `--quick` takes a hundred thousand. Prints one JSON object as its last
line.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calrec_jax.ranking.dense import DenseIndex, unit

DIM, K, USERS, SIDE = 576, 10, (1, 32, 256), 2048


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
  """The least of some runs, after one that compiles."""
  jax.block_until_ready(call())
  took = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(call())
    took.append(time.perf_counter() - begun)
  return min(took)


def peer(users_UD: np.ndarray, texts_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  scores_UT = users_UD @ texts_TD.T
  texts_UK = np.argpartition(scores_UT, -K, axis=1)[:, -K:]
  scores_UK = np.take_along_axis(scores_UT, texts_UK, axis=1)
  order_UK = np.argsort(-scores_UK, axis=1)
  return np.take_along_axis(scores_UK, order_UK, axis=1), np.take_along_axis(texts_UK, order_UK, axis=1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='a hundred thousand texts')
  n_texts = 100_000 if parser.parse_args().quick else 1_000_000
  rng = np.random.default_rng(0)
  texts_TD = np.empty((n_texts, DIM), np.float32)
  for start in range(0, n_texts, 10_000):
    texts_TD[start:start + 10_000] = unit(rng.standard_normal((10_000, DIM), dtype=np.float32))
  begun = time.perf_counter()
  index = DenseIndex(texts_TD)
  jax.block_until_ready(index.blocks)
  built = time.perf_counter() - begun
  add, product, square = jax.jit(jnp.sum), jax.jit(jnp.matmul), jnp.ones((SIDE, SIDE), jnp.float32)
  reading, multiplying, ours, peers = [], [], {}, {}
  for n_users in USERS:
    users_UD = unit(rng.standard_normal((n_users, DIM), dtype=np.float32))
    reading.append(best_seconds(lambda: [add(block) for block in index.blocks], 5))
    multiplying.append(best_seconds(lambda: product(square, square), 10))
    ours[n_users] = best_seconds(lambda users_UD=users_UD: index.top_k(users_UD, K), 5 if n_users > 100 else 10)
    peers[n_users] = best_seconds(lambda users_UD=users_UD: peer(users_UD, texts_TD), 1 if n_users > 100 else 3)
    for found, expected in zip(index.top_k(users_UD, K), peer(users_UD, texts_TD), strict=True):
      np.testing.assert_allclose(found, expected, rtol=1e-5)
  bandwidth, speed = sum(block.nbytes for block in index.blocks) / min(reading), 2 * SIDE**3 / min(multiplying)
  print(f'{n_texts} texts: built in {built:.1f} s; reading {bandwidth / 1e9:.1f} GB/s, products {speed / 1e9:.0f} GFLOP/s')
  shares, ratios = {}, {}
  for n_users, took in ours.items():
    read, multiply = texts_TD.nbytes / bandwidth, 2 * n_users * texts_TD.size / speed
    shares[n_users], ratios[n_users] = max(read, multiply) / took, peers[n_users] / took
    print(f'{n_users} users: {took * 1e3:.1f} ms, {shares[n_users]:.0%} of the bound by '
          f'{"reading" if read > multiply else "products"} ({(read + multiply) / took:.0%} of reading and then multiplying); '
          f'the peer {peers[n_users] * 1e3:.1f} ms')
  print(json.dumps({'name': 'dense_speed', 'ratio': round(min(shares.values()), 2), 'device': jax.devices()[0].device_kind,
                    'shares': {str(n): round(share, 2) for n, share in shares.items()},
                    'peer': 'NumPy product and argpartition',
                    'peer_ratios': {str(n): round(ratio, 1) for n, ratio in ratios.items()},
                    'users_per_second': {str(n): round(n / took) for n, took in ours.items()}}))


if __name__ == '__main__':
  main()
