"""GGUF as a tensor source: llama.cpp's names, layouts and defaults turned back into Hugging Face's."""

import os
import re
from typing import Any

import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.gguf_files import GgufFile
from calrec_jax.models import rope
from calrec_jax.models.decoder_config import DecoderConfig

# llama.cpp's architecture -> transformers'.
ARCHITECTURES = {'llama': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'gemma': 'gemma', 'gemma2': 'gemma2',
                 'gemma3': 'gemma3_text'}
# Names of tensors, there -> here.
_TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
_LAYER = {
    'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
    'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj', 'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
_POST_NORMS = {'post_attention_norm': 'post_attention_layernorm', 'ffn_norm': 'pre_feedforward_layernorm',
               'post_ffw_norm': 'post_feedforward_layernorm'}
_ROPE_FREQS = 'rope_freqs.weight'
# llama.cpp knows the largest Gemmas by their layers: their scores are scaled by the width of a head's share of the embedding.
_SCALED_BY_SHARE = {('gemma2', 46), ('gemma3', 62)}


class GgufSource:
  """A GGUF file as a `TensorSource`. Raises UserError as `GgufFile` does, and for an architecture that is not known."""

  def __init__(self, path: str | os.PathLike):
    self.file = GgufFile(path)
    metadata = self.file.metadata
    self.kind = metadata.get('general.architecture')
    if self.kind not in ARCHITECTURES:
      raise UserError(f'{path}: the architecture {self.kind!r} is not known; known are {", ".join(ARCHITECTURES)}.')
    self.architecture = ARCHITECTURES[self.kind]
    self.config = _config(self.file, self.kind)
    self.about = {'name': metadata.get('general.name') or self.file.path.stem, 'license': metadata.get('general.license'),
                  'max_position_embeddings': metadata.get(f'{self.kind}.context_length', 2048), 'source': self.file.path.name}
    self.dtype = 'float32'  # norms are that in every file
    parts = _LAYER | (_POST_NORMS if self.config.post_norms else {})
    self._names = {_hf_name(name, parts): name for name in self.file.tensors if name != _ROPE_FREQS}

  def names(self) -> set[str]:
    return set(self._names)

  def shape(self, name: str) -> tuple[int, ...]:
    return self.file.tensors[self._names[name]].shape

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of a tensor, float32, as Hugging Face has them."""
    heads = {'q_proj': self.config.n_heads, 'k_proj': self.config.n_kv_heads}.get(name.split('.')[-2])
    if self.kind == 'llama' and heads:  # rows are moved, so all are read
      return _unpaired(self.file.read(self._names[name]), heads)[start:stop]
    rows = self.file.read(self._names[name], start, stop)
    return rows - 1 if self.config.norm_unit_offset and name.endswith('norm.weight') else rows


def _unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp turns neighbouring channels of a head, and its files have them paired; the first halves come first here."""
  return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _hf_name(name: str, parts: dict[str, str]) -> str:
  """Hugging Face's name of a tensor; an unknown one keeps its own, which the import then names."""
  if match := re.fullmatch(r'blk\.(\d+)\.(\w+)\.(weight|bias)', name):
    layer, part, kind = match.groups()
    return f'model.layers.{layer}.{parts[part]}.{kind}' if part in parts else name
  stem, _, kind = name.rpartition('.')
  return f'{_TOP[stem]}.{kind}' if stem in _TOP else name


def _config(file: GgufFile, kind: str) -> DecoderConfig:
  """The decoder's shape; what llama.cpp has in its code and not in the file is said here."""
  def get(key: str, default: Any = None) -> Any:
    value = file.metadata.get(f'{kind}.{key}', default)
    if value is None:
      raise UserError(f'{file.path}: has no {kind}.{key}; download the file again.')
    return value
  for name in ('token_embd.weight', 'blk.0.attn_norm.weight'):
    if name not in file.tensors:
      raise UserError(f'{file.path}: has no tensor {name}; a file of one whole model is needed, not a part of a split one.')
  has = lambda name: f'blk.0.{name}' in file.tensors
  n_layers, embed_dim, n_heads = get('block_count'), get('embedding_length'), get('attention.head_count')
  head_dim = get('attention.key_length', embed_dim // n_heads)
  if get('rope.dimension_count', head_dim) != head_dim:
    raise UserError(f'{file.path}: rotary positions of {get("rope.dimension_count")} of {head_dim} channels are not known; '
                    'take another model.')
  fields = {
      'vocab_size': file.tensors['token_embd.weight'].shape[0], 'n_layers': n_layers, 'embed_dim': embed_dim,
      'n_heads': n_heads, 'n_kv_heads': get('attention.head_count_kv', n_heads), 'head_dim': head_dim,
      'ff_dim': get('feed_forward_length'),
      'norm_eps': get('attention.layer_norm_rms_epsilon'), 'tied_head': 'output.weight' not in file.tensors,
      'qkv_bias': has('attn_q.bias'), 'out_bias': has('attn_output.bias'), 'mlp_bias': has('ffn_down.bias'),
      'qk_norm': has('attn_q_norm.weight'), 'post_norms': has('post_ffw_norm.weight')}
  if kind.startswith('gemma'):
    fields |= {'norm_unit_offset': True, 'embed_scale': True, 'activation': 'gelu'}
  if (kind, n_layers) in _SCALED_BY_SHARE:
    fields['query_scale'] = (embed_dim // n_heads) ** -0.5
  if kind == 'gemma2':
    fields |= {'attention_softcap': float(get('attn_logit_softcapping', 50.0)),
               'logit_softcap': float(get('final_logit_softcapping', 30.0)),
               'window': get('attention.sliding_window', 4096), 'layer_pattern': 'LG'}
  elif kind == 'gemma3':
    fields |= {'window': get('attention.sliding_window'), 'layer_pattern': 'LLLLLG',
               'local_rope_base': float(get('rope.freq_base_swa', 10_000.0))}
  elif f'{kind}.attention.sliding_window' in file.metadata:
    raise UserError(f'{file.path}: {kind} with a sliding window is not known here; take the Hugging Face folder of the model.')
  return DecoderConfig(**fields, **_rope(file, kind, head_dim))


def _rope(file: GgufFile, kind: str, head_dim: int) -> dict[str, Any]:
  """The rotary fields. Llama 3's stretching is a tensor of factors in the file: its options are found again, and compared."""
  base = float(file.metadata.get(f'{kind}.rope.freq_base', 1_000_000.0 if kind == 'gemma3' else 10_000.0))
  scaling = file.metadata.get(f'{kind}.rope.scaling.type', 'none')
  if _ROPE_FREQS in file.tensors:
    factors_K = file.read(_ROPE_FREQS)
    fields = {'rope_base': base, 'rope_scaling': 'llama3', 'rope_factor': float(round(factors_K.max()))}
    frequency_K = rope.frequencies(head_dim, base)
    ours_K = frequency_K / rope.scaled(frequency_K, DecoderConfig(**fields))
    if factors_K.shape != ours_K.shape or not np.allclose(factors_K, ours_K, rtol=1e-3):
      raise UserError(f'{file.path}: {_ROPE_FREQS} stretches rotary positions in another way than Llama 3 does; take the '
                      'Hugging Face folder of the model.')
    return fields
  if scaling == 'none':
    return {'rope_base': base}
  if scaling != 'linear':
    raise UserError(f'{file.path}: rotary positions scaled as {scaling!r} are not known; known are linear and Llama 3\'s.')
  return {'rope_base': base, 'rope_scaling': 'linear', 'rope_factor': float(file.metadata[f'{kind}.rope.scaling.factor'])}
