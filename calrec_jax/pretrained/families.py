"""Architectures: a Hugging Face `config.json` to the decoder's shape, and back.

Keys of transformers 4 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`) are read; those of 4 are written, which both
read.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from calrec_jax.errors import UserError
from calrec_jax.models.decoder_config import DecoderConfig

_SIZES = {
    'vocab_size': 'vocab_size', 'n_layers': 'num_hidden_layers', 'embed_dim': 'hidden_size', 'n_heads': 'num_attention_heads',
    'n_kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim', 'ff_dim': 'intermediate_size', 'norm_eps': 'rms_norm_eps',
    'tied_head': 'tie_word_embeddings'}
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu'}
_SCALINGS = {
    'default': {}, 'linear': {'rope_factor': 'factor'},
    'llama3': {'rope_factor': 'factor', 'rope_low_freq_factor': 'low_freq_factor', 'rope_high_freq_factor': 'high_freq_factor',
               'rope_original_length': 'original_max_position_embeddings'}}
_CAPS = {'attention_softcap': 'attn_logit_softcapping', 'logit_softcap': 'final_logit_softcapping'}
_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'
_NO_WINDOWS = ('llama', 'gemma')  # architectures in which all layers are global
# What a key holds if it is there; numbers are above 0.
_KINDS = {
    **dict.fromkeys({*_SIZES.values(), 'max_position_embeddings', 'sliding_window', 'sliding_window_pattern'}, int),
    **dict.fromkeys({'rms_norm_eps', 'query_pre_attn_scalar', *_CAPS.values(), 'rope_theta', 'rope_local_base_freq'}, float),
    **dict.fromkeys(('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'), float),
    **dict.fromkeys(('tie_word_embeddings', 'attention_bias', 'mlp_bias', 'use_sliding_window'), bool),
    **dict.fromkeys(('hidden_act', 'hidden_activation', 'rope_type', 'type'), str),
    **dict.fromkeys(('rope_parameters', 'rope_scaling', _LOCAL, _GLOBAL), dict), 'layer_types': list}
_WORDS = {int: 'a whole number above 0', float: 'a number above 0', bool: 'true or false', str: 'a text', dict: 'an object',
          list: 'a list'}


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture of transformers.

  Attributes:
    model_type: its name in a `config.json`.
    model_class: the class of its causal language model.
    fixed: fields of the decoder that the architecture always has.
    defaults: keys that a `config.json` may leave out, with what they are then.
  """

  model_type: str
  model_class: str
  fixed: Mapping[str, Any]
  defaults: Mapping[str, Any]


_COMMON = {'rms_norm_eps': 1e-6, 'rope_theta': 10_000.0, 'hidden_act': 'silu', 'tie_word_embeddings': False,
           'attention_bias': False, 'mlp_bias': False, 'max_position_embeddings': 2048}
_QWEN = {'use_sliding_window': False, 'max_window_layers': 28}
_GEMMA = {**_COMMON, 'hidden_act': 'gelu_pytorch_tanh', 'tie_word_embeddings': True, 'head_dim': 256,
          'max_position_embeddings': 8192}
_GEMMA_2 = {**_GEMMA, 'vocab_size': 256_000, 'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
            'num_attention_heads': 8, 'num_key_value_heads': 4, 'query_pre_attn_scalar': 256, 'sliding_window': 4096}
_UNIT = {'norm_unit_offset': True, 'embed_scale': True}
FAMILIES = {family.model_type: family for family in (
    Family('llama', 'LlamaForCausalLM', {}, _COMMON),
    Family('qwen2', 'Qwen2ForCausalLM', {'qkv_bias': True}, _COMMON | _QWEN),
    Family('qwen3', 'Qwen3ForCausalLM', {'qk_norm': True}, _COMMON | _QWEN | {'head_dim': 128}),
    Family('gemma', 'GemmaForCausalLM', _UNIT, _GEMMA),
    Family('gemma2', 'Gemma2ForCausalLM', _UNIT | {'post_norms': True},
           _GEMMA_2 | {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0, 'sliding_window_pattern': 2}),
    Family('gemma3_text', 'Gemma3ForCausalLM', _UNIT | {'post_norms': True, 'qk_norm': True},
           _GEMMA_2 | {'vocab_size': 262_208, 'rope_theta': 1_000_000.0, 'rope_local_base_freq': 10_000.0,
                       'sliding_window_pattern': 6, 'max_position_embeddings': 131_072}))}


def family_of(hf: Mapping[str, Any], where: str) -> tuple[Family, dict[str, Any]]:
  """(the family, its keys with the defaults) of a parsed `config.json`; of Gemma 3's, the part about text.

  Raises:
    UserError: an architecture that is not known, or weights that are quantised.
  """
  text = hf.get('text_config', {}) if hf.get('model_type') == 'gemma3' else hf
  kind = text.get('model_type', 'gemma3_text' if text is not hf else None) if isinstance(text, dict) else text
  if kind not in list(FAMILIES):
    raise UserError(f'{where}: the architecture {kind!r} is not known; known are {", ".join(FAMILIES)} and gemma3.')
  family = FAMILIES[kind]
  if 'quantization_config' in hf:
    raise UserError(f'{where}: the weights are quantised (quantization_config); take the model that they were made from, or a '
                    'GGUF file.')
  stated = {key: value for key, value in text.items() if value is not None or key in _CAPS.values()}
  keys = {**family.defaults, **stated}
  _check_kinds(keys, where)
  return family, keys


def to_config(hf: Mapping[str, Any], where: str) -> DecoderConfig:
  """The decoder of a parsed `config.json`.

  Args:
    hf: the parsed file.
    where: its name, for messages.

  Raises:
    UserError: an architecture, or a setting of it, that the decoder does not have; a key that is missing.
  """
  family, keys = family_of(hf, where)
  if family.model_type != 'gemma' and 'hidden_activation' in keys:
    keys['hidden_act'] = keys['hidden_activation']
  elif family.model_type == 'gemma' and keys['hidden_act'] == 'gelu':
    keys['hidden_act'] = 'gelu_pytorch_tanh'  # the first files said so, and meant this; transformers reads it thus too
  if 'head_dim' not in keys and 'hidden_size' in keys and 'num_attention_heads' in keys:
    keys['head_dim'] = keys['hidden_size'] // keys['num_attention_heads']
  keys.setdefault('num_key_value_heads', keys.get('num_attention_heads'))
  if missing := [key for key in _SIZES.values() if not keys.get(key) and key != 'tie_word_embeddings']:
    raise UserError(f'{where}: has no {", ".join(missing)}; restore the file as it was published.')
  _refuse(keys, where)
  fields = {name: keys[key] for name, key in _SIZES.items()} | family.fixed
  if family.model_type != 'qwen2':
    fields |= {'qkv_bias': keys['attention_bias'], 'out_bias': keys['attention_bias']}
  if family.model_type == 'llama':
    fields['mlp_bias'] = keys['mlp_bias']
  fields['activation'] = _ACTIVATIONS[keys['hidden_act']]
  if keys.get('query_pre_attn_scalar', keys['head_dim']) != keys['head_dim']:
    fields['query_scale'] = keys['query_pre_attn_scalar'] ** -0.5
  fields |= {name: float(keys[key]) for name, key in _CAPS.items() if keys.get(key) is not None}
  fields |= _windows(family, keys, where)
  return DecoderConfig(**fields, **_rope(family, keys, 'window' in fields, where))


def from_config(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
  """(the family, the keys of a `config.json`) that `to_config` makes this decoder of, which has no low-rank factors.

  Raises:
    UserError: no architecture of transformers has all that the decoder has.
  """
  config = dataclasses.replace(config, user_half_life=None)  # how v_U is made is not in those files
  for family in FAMILIES.values():
    keys = _keys(config, family)
    if to_config(keys, 'export').shape() == config.shape():
      return family, keys
  raise UserError(f'No architecture of transformers ({", ".join(FAMILIES)}) has a decoder of this shape: {config}; export one '
                  'that was imported, or gin/models/tiny.gin.')


def _keys(config: DecoderConfig, family: Family) -> dict[str, Any]:
  """The keys of a `config.json` of the family that come nearest to the decoder."""
  layer_types = [_LOCAL if local else _GLOBAL for local in config.local_layers]
  activation = {'silu': 'silu', 'gelu': 'gelu_pytorch_tanh'}[config.activation]
  keys = {'model_type': family.model_type, 'architectures': [family.model_class], 'hidden_act': activation,
          **{key: getattr(config, name) for name, key in _SIZES.items()}, 'rope_theta': config.rope_base}
  if config.rope_scaling != 'none':
    scaling = {key: getattr(config, name) for name, key in _SCALINGS[config.rope_scaling].items()}
    keys['rope_scaling'] = {'rope_type': config.rope_scaling, **scaling}
  if family.model_type != 'qwen2':
    keys['attention_bias'] = config.qkv_bias
  if family.model_type == 'llama':
    keys['mlp_bias'] = config.mlp_bias
  elif family.model_type != 'gemma':
    keys['layer_types'] = layer_types
    keys['sliding_window'] = config.window
  if family.model_type in ('qwen2', 'qwen3'):
    keys['use_sliding_window'] = config.window is not None
  if 'query_pre_attn_scalar' in family.defaults:
    keys['hidden_activation'] = activation
    keys['query_pre_attn_scalar'] = config.head_dim if config.query_scale is None else _scalar(config.query_scale)
    keys |= {key: getattr(config, name) for name, key in _CAPS.items()}
  if 'rope_local_base_freq' in family.defaults and config.local_rope_base is not None:
    keys['rope_local_base_freq'] = config.local_rope_base
  return keys


def _scalar(query_scale: float) -> float:
  """The number whose -0.5th power is the scale; whole, where that is exact."""
  scalar = query_scale**-2
  return round(scalar) if round(scalar) ** -0.5 == query_scale else scalar


def _check_kinds(keys: Mapping[str, Any], where: str) -> None:
  """Raises UserError for a value that is not of its key's kind, as in a file that was edited by hand."""
  for key in sorted(_KINDS.keys() & keys.keys()):
    value, kind = keys[key], _KINDS[key]
    if kind in (int, float):
      right = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value < math.inf
    else:
      right = isinstance(value, kind)
    if not right and value is not None:
      raise UserError(f'{where}: {key} = {value!r} is not {_WORDS[kind]}; restore the file as it was published.')


def _refuse(keys: Mapping[str, Any], where: str) -> None:
  """Raises UserError for what the decoder does not have."""
  strange = {'use_bidirectional_attention': keys.get('use_bidirectional_attention'),
             'partial_rotary_factor': keys.get('partial_rotary_factor', 1) != 1,
             'hidden_act': keys['hidden_act'] not in _ACTIVATIONS}
  if found := [f'{key} = {keys[key]!r}' for key, is_strange in strange.items() if is_strange]:
    raise UserError(f'{where}: {", ".join(found)} is not known here; choose another model.')


def _windows(family: Family, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The decoder's `window` and `layer_pattern`; {} where every layer is global."""
  n_layers, types, window = keys['num_hidden_layers'], keys.get('layer_types'), keys.get('sliding_window')
  if 'use_sliding_window' in family.defaults and not keys['use_sliding_window']:
    return {}
  if types is None and 'sliding_window_pattern' in family.defaults:
    every = keys.get('sliding_window_pattern')
    types = [_GLOBAL if (layer + 1) % every == 0 else _LOCAL for layer in range(n_layers)]
  elif types is None and 'use_sliding_window' in family.defaults:
    types = [_LOCAL if layer >= keys['max_window_layers'] else _GLOBAL for layer in range(n_layers)]
  if types is None or types[:n_layers] == [_GLOBAL] * n_layers:
    return {}
  known = (_GLOBAL, _LOCAL) if window and family.model_type not in _NO_WINDOWS else (_GLOBAL,)
  if len(types) < n_layers or any(kind not in known for kind in types):
    raise UserError(f'{where}: {len(types)} layer_types ({", ".join(sorted(set(map(str, types))))}) with sliding_window = '
                    f'{window} are not those of the {n_layers} layers; restore the file as it was published.')
  return {'window': window, 'layer_pattern': shortest(['L' if kind == _LOCAL else 'G' for kind in types[:n_layers]])}


def shortest(letters: Sequence[str]) -> str:
  """The shortest pattern that, repeated and cut, gives the letters."""
  whole = ''.join(letters)
  return next(whole[:n] for n in range(1, len(whole) + 1) if (whole[:n] * len(whole))[:len(whole)] == whole)


def _rope(family: Family, keys: Mapping[str, Any], windowed: bool, where: str) -> dict[str, Any]:
  """The decoder's rotary fields."""
  new = keys.get('rope_parameters') or {}
  _check_kinds(new, where)
  by_layer = _GLOBAL in new
  parameters = new[_GLOBAL] if by_layer else {'rope_theta': keys['rope_theta'], **(keys.get('rope_scaling') or {}), **new}
  local = {'rope_theta': keys.get('rope_local_base_freq'), **((new.get(_LOCAL) or {}) if by_layer else {})}
  for stated in (parameters, local):
    _check_kinds(stated, where)
  kind = parameters.get('rope_type', parameters.get('type', 'default'))
  if kind not in _SCALINGS or parameters.get('partial_rotary_factor', 1) != 1 or local.get('rope_type', 'default') != 'default':
    raise UserError(f'{where}: rotary positions of the kind {kind!r} ({new or keys.get("rope_scaling")}) are not known; known '
                    f'are {", ".join(_SCALINGS)}, with local layers unscaled.')
  if missing := [key for key in _SCALINGS[kind].values() if parameters.get(key) is None]:
    raise UserError(f'{where}: rotary positions of the kind {kind!r} have no {", ".join(missing)}; restore the file as it was '
                    'published.')
  fields = {'rope_base': float(parameters['rope_theta']), **{name: parameters[key] for name, key in _SCALINGS[kind].items()}}
  if kind != 'default':
    fields['rope_scaling'] = kind
  if windowed and 'rope_local_base_freq' in family.defaults:
    fields['local_rope_base'] = float(local['rope_theta'])
  return fields
