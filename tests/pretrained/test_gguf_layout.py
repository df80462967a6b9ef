"""A GGUF file gives the model that it was made from: names, rotary order, norms, scalings, quantised numbers."""

import gguf
import gguf_models
import numpy as np
import pretrained_models
import pytest
import torch
import transformers

from calrec_jax.errors import UserError
from calrec_jax.inference.loading import load
from calrec_jax.pretrained import families, gguf_layout
from calrec_jax.pretrained.gguf_layout import GgufSource
from calrec_jax.pretrained.importing import import_model
from calrec_jax.pretrained.tensors import tensors

# llama_3 has a test of its own; the others have what llama.cpp's files do not hold.
NAMES = [name for name in pretrained_models.MODELS if name not in ('llama_3', 'qwen2_windows', 'gemma2_uncapped')]
TOKENS = np.random.default_rng(1).integers(2, 37, 12)


def make(name: str):
  """The model with what llama.cpp knows by itself: Gemma 3's local base, scores scaled by head_dim ** -0.5."""
  config_class, options = pretrained_models.MODELS[name]
  changes = {'query_pre_attn_scalar': 8} if 'query_pre_attn_scalar' in options else {}
  if name == 'gemma3':
    changes['rope_parameters'] = options['rope_parameters'] | {'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}}
  pretrained_models.MODELS[f'{name}_gguf'] = (config_class, options | changes)
  try:
    return pretrained_models.make(f'{name}_gguf')
  finally:
    del pretrained_models.MODELS[f'{name}_gguf']


@pytest.mark.parametrize('name', NAMES)
def test_the_source_gives_the_original_tensors_and_shape(name, tmp_path):
  model = make(name)
  source = GgufSource(gguf_models.write(model, tmp_path / 'model.gguf'))
  assert source.config == families.to_config(model.config.to_dict(), 'test')
  state = model.state_dict()
  wanted = [tensor.name for tensor in tensors(source.config)]
  assert source.names() == set(wanted)
  for key in wanted:
    assert source.shape(key) == tuple(state[key].shape)
    np.testing.assert_allclose(source.read(key), state[key].numpy(), atol=3e-7)  # Gemma's norms: 1 is added and taken away
    np.testing.assert_array_equal(source.read(key, 3, 7), source.read(key)[3:7])


def logits(path, tokens):
  loaded = load(path, dtype='float32')
  states = loaded.decoder.apply({'params': loaded.params}, tokens[None], np.ones((1, 12), int), np.arange(12)[None])
  return np.asarray(loaded.decoder.apply({'params': loaded.params}, states, method='logits'))[0]


@pytest.mark.parametrize('name', ['llama', 'qwen2'])  # of the others it does not read all options
def test_an_import_gives_the_logits_of_transformers_own_reader_of_the_file(name, tmp_path, monkeypatch):
  monkeypatch.setitem(pretrained_models._SIZES, 'hidden_size', 32)
  gguf_models.write(make(name), tmp_path / 'model.gguf')
  import_model(tmp_path / 'model.gguf', tmp_path / 'checkpoint')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, gguf_file='model.gguf', attn_implementation='eager', dtype=torch.float32)
  np.testing.assert_allclose(logits(tmp_path / 'checkpoint', TOKENS), pretrained_models.logits(theirs, TOKENS), atol=1e-4)


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1'])
def test_quantised_tensors_are_those_that_the_library_dequantises(kind, tmp_path, monkeypatch):
  monkeypatch.setitem(pretrained_models.MODELS, 'wide', ('LlamaConfig', {
      'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 2, 'head_dim': 16, 'tie_word_embeddings': True}))
  model = pretrained_models.make('wide')
  import_model(gguf_models.write(model, tmp_path / 'model.gguf', kind=kind), tmp_path / 'checkpoint')
  state = model.state_dict()
  with torch.no_grad():
    for weight in state.values():
      if weight.ndim == 2:
        type_ = gguf.GGMLQuantizationType[kind]
        weight.copy_(torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), type_), type_)))
  model.load_state_dict(state)
  np.testing.assert_allclose(logits(tmp_path / 'checkpoint', TOKENS), pretrained_models.logits(model, TOKENS), atol=1e-4)


def test_the_rotary_order_matters(tmp_path, monkeypatch):
  model = make('llama')
  gguf_models.write(model, tmp_path / 'model.gguf')
  monkeypatch.setattr(gguf_layout, '_unpaired', lambda rows, heads: rows)  # the mutant
  import_model(tmp_path / 'model.gguf', tmp_path / 'checkpoint')
  assert not np.allclose(logits(tmp_path / 'checkpoint', TOKENS), pretrained_models.logits(model, TOKENS), atol=1e-2)


def test_llama_3_stretching_is_found_again(tmp_path):
  rope = {'rope_type': 'llama3', 'rope_theta': 500_000.0, 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 8192}
  config = transformers.LlamaConfig(**pretrained_models._SIZES | {'head_dim': 64, 'rope_parameters': rope})
  model = transformers.AutoModelForCausalLM.from_config(config)
  source = GgufSource(gguf_models.write(model, tmp_path / 'model.gguf'))
  assert source.config == families.to_config(config.to_dict(), 'test')
  with pytest.raises(UserError, match='in another way than Llama 3 does'):
    GgufSource(gguf_models.write(make('llama_3'), tmp_path / 'other.gguf'))  # stretched from 16 tokens on


def test_the_largest_gemmas_are_scaled_by_a_heads_share(tmp_path, monkeypatch):
  monkeypatch.setitem(pretrained_models.MODELS, 'gemma2', ('Gemma2Config', {
      'num_hidden_layers': 46, 'query_pre_attn_scalar': 6, 'tie_word_embeddings': True}))  # 27B: 4608 / 32 = 144
  config = GgufSource(gguf_models.write(pretrained_models.make('gemma2'), tmp_path / 'model.gguf')).config
  assert config.query_scale == 6**-0.5  # 24 / 4, where head_dim is 8


@pytest.mark.parametrize('changes, message', [
    ({'general.architecture': 'mamba'}, "architecture 'mamba' is not known; known are llama, qwen2"),
    ({'llama.block_count': None}, 'has no llama.block_count'),
    ({'llama.rope.dimension_count': 4}, 'rotary positions of 4 of 8 channels'),
    ({'llama.rope.scaling.type': 'yarn'}, "'yarn' are not known; known are linear"),
    ({'llama.attention.sliding_window': 4}, 'sliding window is not known')])
def test_what_the_decoder_cannot_be_is_refused(tmp_path, changes, message):
  path = gguf_models.write(make('llama'), tmp_path / 'model.gguf', **changes)
  with pytest.raises(UserError, match=message) as error:
    import_model(path, tmp_path / 'out')
  assert str(path) in str(error.value) and '\n' not in str(error.value) and not (tmp_path / 'out').exists()
