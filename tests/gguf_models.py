"""Writes a model of transformers as a GGUF file, as llama.cpp's converter does."""

import pathlib
from typing import Any

import gguf
import numpy as np

_KINDS = {'llama': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'gemma': 'gemma', 'gemma2': 'gemma2', 'gemma3_text': 'gemma3'}
_PARTS = {
    'q_proj': 'attn_q', 'k_proj': 'attn_k', 'v_proj': 'attn_v', 'o_proj': 'attn_output', 'q_norm': 'attn_q_norm',
    'k_norm': 'attn_k_norm', 'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up', 'down_proj': 'ffn_down',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm', 'embed_tokens': 'token_embd', 'norm': 'output_norm', 'lm_head': 'output'}
_GEMMA_2 = {'post_attention_layernorm': 'post_attention_norm', 'pre_feedforward_layernorm': 'ffn_norm',
            'post_feedforward_layernorm': 'post_ffw_norm'}


def letters(size: int) -> list[str]:
  return ['<pad>', '</s>', *map(chr, range(ord('A'), ord('A') + size - 3)), 'AB']


def write(model: Any, path: pathlib.Path, *, kind: str = 'F32', **changes: Any) -> pathlib.Path:
  """Matrices are stored as `kind`; `changes` replace metadata (None: left out)."""
  config = model.config
  name = _KINDS[config.model_type]
  metadata = {
      f'{name}.context_length': config.max_position_embeddings, f'{name}.block_count': config.num_hidden_layers,
      f'{name}.embedding_length': config.hidden_size, f'{name}.feed_forward_length': config.intermediate_size,
      f'{name}.attention.head_count': config.num_attention_heads, f'{name}.attention.head_count_kv': config.num_key_value_heads,
      f'{name}.attention.key_length': config.head_dim, f'{name}.rope.dimension_count': config.head_dim,
      f'{name}.vocab_size': config.vocab_size, f'{name}.attention.layer_norm_rms_epsilon': config.rms_norm_eps,
      'general.name': f'tiny {name}', 'general.license': 'mit', 'tokenizer.ggml.eos_token_id': 1,
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.pre': 'gpt-2', 'tokenizer.ggml.add_bos_token': False}
  rope = config.rope_parameters
  rope = rope.get('full_attention', rope)
  metadata[f'{name}.rope.freq_base'] = float(rope['rope_theta'])
  if rope['rope_type'] == 'linear':
    metadata |= {f'{name}.rope.scaling.type': 'linear', f'{name}.rope.scaling.factor': float(rope['factor'])}
  if name in ('gemma2', 'gemma3'):
    metadata[f'{name}.attention.sliding_window'] = config.sliding_window
  if name == 'gemma2':
    metadata |= {f'{name}.attn_logit_softcapping': config.attn_logit_softcapping,
                 f'{name}.final_logit_softcapping': config.final_logit_softcapping}
  writer = gguf.GGUFWriter(path, changes.pop('general.architecture', name))
  for key, value in (metadata | changes).items():
    if value is not None:
      add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
      add(key, value)
  tokens = letters(config.vocab_size)
  writer.add_array('tokenizer.ggml.tokens', tokens)
  writer.add_array('tokenizer.ggml.token_type', [3, 3] + [1] * (len(tokens) - 2))
  writer.add_array('tokenizer.ggml.merges', ['A B'])
  if rope['rope_type'] == 'llama3':
    plain = rope['rope_theta'] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    writer.add_tensor('rope_freqs.weight', (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
  for key, weight in model.state_dict().items():
    if key != 'lm_head.weight' or not config.tie_word_embeddings:
      _add(writer, key, weight.numpy(), config, name, gguf.GGMLQuantizationType[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _add(writer: gguf.GGUFWriter, key: str, weight: np.ndarray, config: Any, name: str,
         kind: gguf.GGMLQuantizationType) -> None:
  *front, part, suffix = key.split('.')
  parts = _PARTS | (_GEMMA_2 if name in ('gemma2', 'gemma3') else {})
  layer = f'blk.{front[2]}.' if 'layers' in front else ''
  if name == 'llama' and part in ('q_proj', 'k_proj'):  # neighbouring channels of a head are turned together
    heads = config.num_attention_heads if part == 'q_proj' else config.num_key_value_heads
    weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
  if name.startswith('gemma') and part.endswith('norm'):
    weight = weight + 1
  there = f'{layer}{parts[part]}.{suffix}'
  if weight.ndim == 1:
    writer.add_tensor(there, weight.astype(np.float32))
  elif kind.name in ('F32', 'F16'):
    writer.add_tensor(there, weight.astype({'F32': np.float32, 'F16': np.float16}[kind.name]))
  else:
    writer.add_tensor(there, gguf.quants.quantize(weight.astype(np.float32), kind), raw_dtype=kind)
