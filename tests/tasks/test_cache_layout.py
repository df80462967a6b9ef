"""The files of a cache are balanced, and SeqIO's way of reading them gives the examples in their own order."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.tasks import cache_layout
from calrec_jax.tasks.cache_layout import BLOCK, FILES_AT_A_TIME, MAX_SHARDS, SHARD_BYTES, shard_numbers


def _read(files: list[np.ndarray], *, cycle_length: int = 16) -> list[int]:
  """What SeqIO reads of files with these examples: it interleaves 16 of them, 16 examples of each in turn."""
  ends = np.cumsum([0, *map(len, files)])
  every = tf.constant(np.concatenate(files))
  dataset = tf.data.Dataset.from_tensor_slices(np.stack([ends[:-1], ends[1:]], 1)).interleave(
      lambda pair: tf.data.Dataset.from_tensor_slices(every[pair[0]:pair[1]]), cycle_length=cycle_length, block_length=16,
      num_parallel_calls=tf.data.AUTOTUNE)
  return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize('n_examples, n_shards', [
    (0, 1), (1, 1), (300, 1), (512, 2), (777, 3), (1300, 5), (4096, 16), (4097, 16), (8192, 32), (9001, 32), (12345, 48)])
def test_seqio_reads_the_examples_in_their_own_order(n_examples, n_shards):
  files = [shard_numbers(n_examples, shard, n_shards) for shard in range(n_shards)]
  assert _read(files) == list(range(n_examples))
  assert n_shards == 1 or _read(files, cycle_length=2 if n_shards > 2 else 1) != list(range(n_examples))  # the mutant


@given(n_examples=st.integers(0, 10**6), n_bytes=st.integers(0, 2**40))
def test_as_many_files_as_the_size_asks_for_and_all_alike(n_examples, n_bytes):
  n = cache_layout.n_shards(n_bytes, n_examples)
  assert 1 <= n <= MAX_SHARDS and (n <= FILES_AT_A_TIME or n % FILES_AT_A_TIME == 0)
  assert n == 1 or (n_bytes >= n * SHARD_BYTES and n_examples >= n * FILES_AT_A_TIME * BLOCK)
  wanted = min(n_bytes // SHARD_BYTES, n_examples // (FILES_AT_A_TIME * BLOCK), MAX_SHARDS)
  assert n > wanted - FILES_AT_A_TIME
  lengths = [len(shard_numbers(n_examples, shard, n)) for shard in {0, 1 % n, n // 2, n - 1}]
  assert max(lengths) - min(lengths) <= BLOCK


@given(n_examples=st.integers(0, 20_000), n_shards=st.sampled_from([1, 2, 7, 16, 32, 64]))
def test_each_example_is_in_one_file(n_examples, n_shards):
  files = [shard_numbers(n_examples, shard, n_shards) for shard in range(n_shards)]
  np.testing.assert_array_equal(np.sort(np.concatenate(files)), np.arange(n_examples))
  assert max(map(len, files)) - min(map(len, files)) <= BLOCK
