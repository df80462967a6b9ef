"""config.json to decoder and back: keys of two generations of transformers, and what is refused."""

import dataclasses

import pretrained_models
import pytest
import transformers

from calrec_jax.errors import UserError
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.pretrained import families

SIZES = {'vocab_size': 40, 'hidden_size': 24, 'intermediate_size': 32, 'num_hidden_layers': 7, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'head_dim': 8}
LLAMA = {'model_type': 'llama', **SIZES}


@pytest.mark.parametrize('name', pretrained_models.MODELS)
def test_a_configuration_of_transformers_comes_back_through_the_decoder(name):
  config_class, options = pretrained_models.MODELS[name]
  hf = getattr(transformers, config_class)(**pretrained_models._SIZES | options)
  config = families.to_config(hf.to_dict(), name)
  family, keys = families.from_config(config)
  again = getattr(transformers, config_class)(**{key: value for key, value in keys.items() if key != 'model_type'})
  assert families.to_config(again.to_dict(), name) == config and family.model_class == keys['architectures'][0]


def test_keys_of_transformers_4_and_5_say_the_same():
  scaling = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 64}
  old = LLAMA | {'rope_theta': 500.0, 'rope_scaling': {'rope_type': 'llama3', **scaling}}
  new = LLAMA | {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 500.0, **scaling}}
  assert families.to_config(old, '') == families.to_config(new, '')
  older = old | {'rope_scaling': {'type': 'llama3', **scaling}}
  assert families.to_config(older, '') == families.to_config(new, '')
  gemma = {'model_type': 'gemma3_text', **SIZES, 'sliding_window': 5}
  old = gemma | {'rope_theta': 1e6, 'rope_local_base_freq': 1e4, 'sliding_window_pattern': 3,
                 'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}}
  local, whole = 'sliding_attention', 'full_attention'
  new = gemma | {'layer_types': [local, local, whole] * 2 + [local], 'rope_parameters': {
      whole: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6}, local: {'rope_type': 'default', 'rope_theta': 1e4}}}
  assert families.to_config(old, '') == families.to_config(new, '')
  assert families.to_config(old, '').layer_pattern == 'LLG'


def test_a_model_of_text_and_pictures_is_its_text_part():
  text = {'model_type': 'gemma3_text', **SIZES}
  assert families.to_config({'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}, '') == (
      families.to_config(text, ''))


def test_windows_that_are_switched_off_are_none():
  qwen = {'model_type': 'qwen2', **SIZES, 'sliding_window': 4, 'layer_types': ['sliding_attention'] * 7}
  assert families.to_config(qwen | {'use_sliding_window': True}, '').layer_pattern == 'L'
  for off in (qwen, qwen | {'use_sliding_window': False}):
    assert transformers.Qwen2Config(**off).sliding_window is None
    assert families.to_config(off, '').window is None


def test_the_first_gemma_files_name_another_gelu_and_mean_the_tanh_form():
  gemma = {'model_type': 'gemma', **SIZES, 'hidden_act': 'gelu'}
  assert transformers.GemmaConfig(**gemma).hidden_act == 'gelu_pytorch_tanh'
  assert families.to_config(gemma, '').activation == 'gelu'
  with pytest.raises(UserError, match="hidden_act = 'gelu'"):
    families.to_config(gemma | {'model_type': 'llama'}, '')


@pytest.mark.parametrize('letters, pattern', [('GGG', 'G'), ('LGLGL', 'LG'), ('LLLLLGLL', 'LLLLLG'), ('GLL', 'GLL'),
                                              ('LLG', 'LLG')])
def test_the_shortest_pattern(letters, pattern):
  assert families.shortest(letters) == pattern


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'mamba'}, "'mamba' is not known; known are llama, qwen2, qwen3, gemma, gemma2, gemma3_text and gemma3"),
    ({'model_type': None}, 'None is not known'), ({'hidden_act': 'relu'}, "hidden_act = 'relu'"),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'), ({'quantization_config': {}}, 'quantised'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}, "'yarn'.*known are default, linear, llama3"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 2.0}}, 'have no low_freq_factor'),
    ({'hidden_size': None}, 'has no hidden_size'), ({'hidden_size': '24'}, "hidden_size = '24' is not a whole number above 0"),
    ({'num_hidden_layers': True}, 'num_hidden_layers = True'), ({'num_key_value_heads': 0}, 'num_key_value_heads = 0'),
    ({'rms_norm_eps': float('inf')}, 'rms_norm_eps = inf is not a number above 0'), ({'hidden_act': ['silu']}, 'is not a text'),
    ({'tie_word_embeddings': 'no'}, "tie_word_embeddings = 'no' is not true or false"),
    ({'model_type': ['llama']}, 'not known'),
    ({'rope_scaling': 'linear'}, "rope_scaling = 'linear' is not an object"), ({'rope_theta': 0}, 'rope_theta = 0'),
    ({'rope_parameters': {'rope_theta': 'x'}}, "rope_theta = 'x'"), ({'layer_types': 'G'}, 'layer_types = .* is not a list'),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': '8'}}, "factor = '8'"),
    ({'layer_types': ['chunked_attention'] * 7}, r'7 layer_types \(chunked_attention\).*not those of the 7 layers'),
    ({'layer_types': ['sliding_attention'] * 7, 'sliding_window': 4}, 'not those of the 7 layers'),
    ({'model_type': 'qwen3', 'layer_types': ['sliding_attention'] * 7, 'use_sliding_window': True}, 'sliding_window = None'),
    ({'model_type': 'gemma3_text', 'layer_types': ['sliding_attention'] * 6}, '6 layer_types.*not those of the 7 layers'),
    ({'model_type': 'gemma3', 'text_config': 'x'}, "'x' is not known"),
    ({'model_type': 'gemma3_text', 'use_bidirectional_attention': True}, 'use_bidirectional_attention')])
def test_what_the_decoder_cannot_be_is_refused(change, message):
  with pytest.raises(UserError, match=message) as error:
    families.to_config(LLAMA | change, 'here/config.json')
  assert str(error.value).startswith('here/config.json: ') and '\n' not in str(error.value)


def test_a_decoder_that_no_architecture_has_is_not_exported():
  config = DecoderConfig(vocab_size=64, qk_norm=True, post_norms=True)
  with pytest.raises(UserError, match='No architecture of transformers'):
    families.from_config(config)
  assert families.from_config(dataclasses.replace(config, post_norms=False))[0].model_type == 'qwen3'
  assert families.from_config(DecoderConfig(vocab_size=64))[0].model_type == 'llama'
  plain = DecoderConfig(vocab_size=64)  # how v_U is made is no part of an architecture
  assert families.from_config(dataclasses.replace(plain, user_half_life=8.0)) == families.from_config(plain)
