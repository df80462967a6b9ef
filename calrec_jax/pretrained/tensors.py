"""The decoder's parameters and Hugging Face's tensors: which is which, and how one lies in the other.

A linear layer's weight is [outputs, inputs] there, and [*inputs, *outputs] here; layers are numbered there, and stacked here.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import traverse_util

from calrec_jax.models.decoder import abstract_params
from calrec_jax.models.decoder_config import DecoderConfig

Path = tuple[str, ...]

_TOP = {('embedding',): 'model.embed_tokens.weight', ('head',): 'lm_head.weight', ('final_norm', 'scale'): 'model.norm.weight'}
_MAPS = {
    'query': 'self_attn.q_proj', 'key': 'self_attn.k_proj', 'value': 'self_attn.v_proj', 'out': 'self_attn.o_proj',
    'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj', 'down': 'mlp.down_proj',
    'query_norm': 'self_attn.q_norm', 'key_norm': 'self_attn.k_norm', 'attention_norm': 'input_layernorm'}
_NORMS = {'mlp_norm': 'post_attention_layernorm'}
_POST_NORMS = {'post_attention_norm': 'post_attention_layernorm', 'mlp_norm': 'pre_feedforward_layernorm',
               'post_mlp_norm': 'post_feedforward_layernorm'}


class TensorSource(Protocol):
  """A model on disk, as tensors with Hugging Face's names and layout.

  Attributes:
    config: the decoder's shape.
    architecture: its `model_type`.
    about: `name`, `license` (None where it is not stated), `max_position_embeddings`, `source`.
    dtype: `bfloat16` if every tensor is that, else `float32`.
  """

  config: DecoderConfig
  architecture: str
  about: dict[str, Any]
  dtype: str

  def names(self) -> set[str]:
    """Of all tensors, without what stands before `model.` in a model of several kinds of input."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Of one tensor."""

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of a tensor, float32 or bfloat16."""


class Tensor(NamedTuple):
  """One tensor: its name there; the parameter here, and the layer, None where it is in none; its shape there."""

  name: str
  path: Path
  layer: int | None
  shape: tuple[int, ...]


def flat_shapes(config: DecoderConfig) -> dict[Path, jax.ShapeDtypeStruct]:
  """Path to shape and dtype of every parameter of the decoder."""
  return traverse_util.flatten_dict(abstract_params(config))


def tensors(config: DecoderConfig) -> Iterator[Tensor]:
  """All tensors of a decoder without low-rank factors."""
  norms = _POST_NORMS if config.post_norms else _NORMS
  for path, leaf in flat_shapes(config).items():
    if path in _TOP:
      yield Tensor(_TOP[path], path, None, _shape_there(path, leaf.shape))
      continue
    name = (_MAPS | norms)[path[-2]] + ('.bias' if path[-1] == 'bias' else '.weight')
    for layer in range(config.n_layers):
      yield Tensor(f'model.layers.{layer}.{name}', path, layer, _shape_there(path, leaf.shape[1:]))


def view(params: dict[Path, np.ndarray], tensor: Tensor) -> np.ndarray:
  """The parameter's part that is the tensor, in the tensor's layout: a view, to read from or to write into."""
  leaf = params[tensor.path] if tensor.layer is None else params[tensor.path][tensor.layer]
  if tensor.path[-1] != 'kernel':
    return leaf.reshape(tensor.shape)
  return leaf.reshape(tensor.shape[::-1]).T


def _shape_there(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
  if path[-1] == 'kernel':
    n_inputs = 2 if path[-2] == 'out' else 1
    return math.prod(shape[n_inputs:]), math.prod(shape[:n_inputs])
  return shape if len(shape) == 2 and path[-1] != 'bias' else (math.prod(shape),)
