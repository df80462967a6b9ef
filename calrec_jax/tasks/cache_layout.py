"""How the examples of a Task lie in the files of its cache, so that SeqIO reads them in their own order.

SeqIO reads 16 files at a time, 16 examples of each in turn, and then the next 16 files. So each 16 files share a stretch of the
examples, which is dealt out to them in blocks of 16; every stretch but the last ends with equally many whole blocks in each.
"""

import numpy as np

FILES_AT_A_TIME, BLOCK = 16, 16  # what SeqIO reads a cache with
SHARD_BYTES, MAX_SHARDS = 2**22, 1024


def n_shards(n_bytes: int, n_examples: int) -> int:
  """The number of files: one for each 4 MiB of text and 256 examples, 1,024 at most; above 16 a multiple of 16."""
  n = max(1, min(n_bytes // SHARD_BYTES, n_examples // (FILES_AT_A_TIME * BLOCK), MAX_SHARDS))
  return n if n <= FILES_AT_A_TIME else n - n % FILES_AT_A_TIME


def shard_numbers(n_examples: int, shard: int, n_shards: int) -> np.ndarray:
  """Which examples are in file number `shard`, in its order: int64 [.]. Files differ by 16 examples at most.

  `n_shards` is at most 16, or a multiple of 16.
  """
  files = min(n_shards, FILES_AT_A_TIME)
  stretch, place = divmod(shard, files)
  n_stretches = n_shards // files
  n_rows = -(-n_examples // (files * BLOCK))  # a row: a block for each file
  rows = np.arange(stretch * n_rows // n_stretches, (stretch + 1) * n_rows // n_stretches)
  numbers = (((rows * files + place) * BLOCK)[:, None] + np.arange(BLOCK)).ravel()
  return numbers[numbers < n_examples]
