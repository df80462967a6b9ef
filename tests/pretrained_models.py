"""Tiny random models of transformers, one for each architecture and variant, and what they compute."""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

torch.set_num_threads(1)
_SIZES = {'vocab_size': 40, 'hidden_size': 24, 'intermediate_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4,
          'num_key_value_heads': 2, 'head_dim': 8, 'max_position_embeddings': 64, 'bos_token_id': None, 'eos_token_id': 1,
          'pad_token_id': None, 'tie_word_embeddings': False}  # head_dim is not hidden_size / num_attention_heads
_LLAMA_3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
            'original_max_position_embeddings': 16}
# Name -> (class of the configuration, its options): every architecture, each variant switched on somewhere.
MODELS = {
    'llama': ('LlamaConfig', {'tie_word_embeddings': True}),
    'llama_biases': ('LlamaConfig', {'attention_bias': True, 'mlp_bias': True, 'num_key_value_heads': 4}),
    'llama_3': ('LlamaConfig', {'rope_parameters': {**_LLAMA_3, 'rope_theta': 500.0}}),
    'qwen2': ('Qwen2Config', {'tie_word_embeddings': True, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6}}),
    'qwen2_windows': ('Qwen2Config', {'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': 1,
                                      'num_hidden_layers': 4}),
    'qwen3': ('Qwen3Config', {'attention_bias': True}),
    'gemma': ('GemmaConfig', {'tie_word_embeddings': True, 'num_key_value_heads': 1}),
    'gemma2': ('Gemma2Config', {'tie_word_embeddings': True, 'sliding_window': 4, 'query_pre_attn_scalar': 20,
                                'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 3.0}),
    'gemma2_uncapped': ('Gemma2Config', {'attn_logit_softcapping': None, 'final_logit_softcapping': None,
                                         'query_pre_attn_scalar': 8, 'sliding_window': 3, 'num_hidden_layers': 2}),
    'gemma3': ('Gemma3TextConfig', {'tie_word_embeddings': True, 'sliding_window': 4, 'num_hidden_layers': 8,
                                    'query_pre_attn_scalar': 12, 'rope_parameters': {
                                        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e4},
                                        'sliding_attention': {'rope_type': 'default', 'rope_theta': 50.0}}})}


def make(name: str, seed: int = 0) -> Any:
  """The model, in float32, its weights drawn so that logits differ widely and nothing is at its initial value."""
  config_class, options = MODELS[name]
  config = getattr(transformers, config_class)(**_SIZES | options)
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').float().eval()
  with torch.no_grad():
    for key, weight in model.named_parameters():
      scale = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
      weight.add_(torch.randn_like(weight) * scale * (2.0 if 'embed' in key or 'lm_head' in key else 1.2))
  return model


def save(model: Any, folder: pathlib.Path, **options: Any) -> pathlib.Path:
  """Writes a Hugging Face folder with a tokenizer of `vocab_size` - 3 ids: fewer than rows."""
  model.save_pretrained(folder, **options)
  save_tokenizer(folder, model.config.vocab_size - 3)
  return folder


def save_tokenizer(folder: pathlib.Path, size: int) -> None:
  """A `tokenizer.json` of the letters a, b, …: ids 0 and 1 are special."""
  letters = ['<pad>', '</s>', *map(chr, range(ord('A'), ord('A') + size - 2))]
  tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  tokenizer.add_special_tokens(['<pad>', '</s>'])
  tokenizer.save(str(folder / 'tokenizer.json'))


def logits(model: Any, tokens_L: np.ndarray) -> np.ndarray:
  """float32 [L, V] of one sequence, alone and without padding."""
  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens_L)[None]), use_cache=False).logits[0].numpy()
