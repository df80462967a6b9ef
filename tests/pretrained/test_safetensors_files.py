"""Rows and shards agree with the safetensors library."""

import json

import ml_dtypes
import numpy as np
import pretrained_models
import pytest
import safetensors.numpy

from calrec_jax.pretrained.safetensors_files import INDEX, SafetensorsSource, write_shards

RNG = np.random.default_rng(0)
TENSORS = {'a': RNG.normal(size=(7, 5)).astype(np.float32), 'b': RNG.normal(size=3).astype(np.float32),
           'c': RNG.normal(size=(2, 9)).astype(np.float32)}


def test_rows_are_those_that_the_library_reads(tmp_path):
  folder = pretrained_models.save(pretrained_models.make('qwen2'), tmp_path, max_shard_size='8KB')
  source = SafetensorsSource(folder)
  assert len(list(folder.glob('*.safetensors'))) > 1
  for file in folder.glob('*.safetensors'):
    for name, expected in safetensors.numpy.load_file(file).items():
      np.testing.assert_array_equal(source.read(name), expected)
      np.testing.assert_array_equal(source.read(name, 2, 5), expected[2:5])
      assert source.shape(name) == expected.shape


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('numbers_a_shard, files', [(1000, 1), (40, 2), (1, 3)])  # the tensors have 35, 3 and 18
def test_the_library_reads_what_is_written(tmp_path, dtype, numbers_a_shard, files):
  numbers = ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.float32
  stored = {name: value.astype(numbers) for name, value in TENSORS.items()}
  order = [(name, value.shape) for name, value in stored.items()]
  limit = numbers_a_shard * stored['a'].itemsize
  n = write_shards(tmp_path, order, lambda name: stored[name], dtype, max_shard_bytes=limit)
  read = {}
  for file in sorted(tmp_path.glob('*.safetensors')):
    part = safetensors.numpy.load_file(file)
    read |= part
    if n > 1:
      index = json.loads((tmp_path / INDEX).read_text())
      assert all(index['weight_map'][name] == file.name for name in part)
  assert read.keys() == stored.keys() and n == files == len(list(tmp_path.glob('*.safetensors')))
  for name, value in stored.items():
    np.testing.assert_array_equal(read[name], value)
