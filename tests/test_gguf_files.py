"""GGUF files: metadata, rows, memory, and files that are not whole."""

import gguf_models
import numpy as np
import pretrained_models
import pytest

from calrec_jax.errors import UserError
from calrec_jax.gguf_files import GgufFile


@pytest.fixture
def path(tmp_path):
  return gguf_models.write(pretrained_models.make('llama'), tmp_path / 'model.gguf')


def test_metadata_are_plain_values_and_float32_are_short_decimals(path):
  metadata = GgufFile(path).metadata
  assert metadata['llama.attention.layer_norm_rms_epsilon'] == 1e-6  # 9.999999974752427e-07 as a float64
  assert metadata['general.architecture'] == 'llama' and metadata['llama.block_count'] == 3
  assert metadata['tokenizer.ggml.tokens'][:3] == ['<pad>', '</s>', 'A'] and metadata['tokenizer.ggml.add_bos_token'] is False


def test_rows_are_read_in_any_pieces(path):
  file = GgufFile(path)
  whole = file.read('token_embd.weight')
  assert whole.dtype == np.float32 and whole.shape == file.tensors['token_embd.weight'].shape == (40, 24)
  np.testing.assert_array_equal(np.concatenate([file.read('token_embd.weight', i, i + 7) for i in range(0, 40, 7)]), whole)
  assert file.read('blk.0.attn_norm.weight', 2, 5).shape == (3,)


@pytest.mark.parametrize('keep', [3, 200, 0.3, 0.99])
def test_a_truncated_file_is_named(path, keep):
  data = path.read_bytes()
  path.write_bytes(data[:keep if isinstance(keep, int) else int(len(data) * keep)])
  with pytest.raises(UserError, match='truncated|not a GGUF file') as error:
    GgufFile(path)
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_a_quantisation_that_is_not_read_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(pretrained_models.MODELS, 'wide', ('LlamaConfig', {'hidden_size': 64, 'intermediate_size': 64}))
  path = gguf_models.write(pretrained_models.make('wide'), tmp_path / 'model.gguf', kind='Q5_0')
  with pytest.raises(UserError, match=r'token_embd.weight is quantised as Q5_0; read are F32, F16, BF16, Q8_0, Q4_0, Q4_1'):
    GgufFile(path)


def test_a_file_of_another_kind_and_none_at_all(tmp_path):
  (tmp_path / 'text.gguf').write_text('hello, this is no model')
  with pytest.raises(UserError, match='not a GGUF file'):
    GgufFile(tmp_path / 'text.gguf')
  with pytest.raises(UserError, match='cannot be read'):
    GgufFile(tmp_path / 'none.gguf')
