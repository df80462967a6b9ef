"""Imports a pretrained decoder: a Hugging Face folder or a GGUF file becomes a checkpoint, its vocabulary and its gin file."""

import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from calrec_jax import outputs, provenance
from calrec_jax.errors import UserError
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.pretrained.gguf_layout import GgufSource
from calrec_jax.pretrained.safetensors_files import SafetensorsSource
from calrec_jax.pretrained.tensors import Path, Tensor, TensorSource, flat_shapes, tensors, view
from calrec_jax.text.vocabularies import TokenizerVocabulary, load_vocabulary
from calrec_jax.training import checkpoints

GIN_FILE = 'model.gin'
DTYPES = ('auto', 'float32', 'bfloat16')
_CHUNK = 8 << 20  # bytes of float32 that are read at once


def import_model(source: str | os.PathLike, out: str | os.PathLike, *, dtype: str = 'auto', eos_token: str | None = None,
                 bos_token: str | None = None) -> dict[str, Any]:
  """Writes the folder `out`, a checkpoint that a run can start from: weights, `vocabulary.json`, `model.gin`.

  One copy of the parameters is in memory, and a piece of one tensor.

  Args:
    source: a Hugging Face folder (`config.json`, safetensors, a tokenizer), or a GGUF file.
    out: the folder to write.
    dtype: of the weights: `float32`, `bfloat16`, or `auto`: bfloat16 if the source has nothing else.
    eos_token, bos_token: see `load_vocabulary`.

  Returns:
    What was read: `name`, `architecture`, `parameters`, `layers`, `vocabulary` (tokens), `embedding_rows`, `bos` and
    `eos` (their texts), `dtype`, `license` (None where it is not stated), `out`.

  Raises:
    UserError: the source is not whole, or not one that the decoder can be; another `dtype`; `out` is there.
  """
  if dtype not in DTYPES:
    raise UserError(f'dtype = {dtype!r}: choose one of {", ".join(DTYPES)}.')
  source = pathlib.Path(source)
  opened: TensorSource = SafetensorsSource(source) if source.is_dir() else GgufSource(source)
  vocabulary = load_vocabulary(source, eos_token=eos_token, bos_token=bos_token)
  wanted = list(tensors(opened.config))
  _check(source, opened, wanted, vocabulary)
  dtype = opened.dtype if dtype == 'auto' else dtype
  parameters = sum(math.prod(tensor.shape) for tensor in wanted)
  name, licence = _one_line(opened.about['name']), _one_line(opened.about['license'] or '') or None
  pretrained = {**opened.about, 'name': name, 'license': licence, 'architecture': opened.architecture,
                'parameters': parameters}
  description = {'decoder': opened.config.shape(), 'vocabulary': vocabulary.fingerprint, 'template': None,
                 'task_feature_lengths': None, 'data': None, 'gin': '', 'versions': provenance.versions(),
                 'pretrained': pretrained}
  with outputs.new_folder(out) as scratch:
    params = _read(opened, wanted, dtype)
    checkpoints.write_params(scratch, {'decoder': traverse_util.unflatten_dict(params)}, description)
    vocabulary.save(scratch / checkpoints.VOCABULARY_FILE)
    (scratch / GIN_FILE).write_text(gin_text(opened.config, pretrained), encoding='utf-8')
  return {'name': name, 'architecture': opened.architecture, 'parameters': parameters,
          'layers': opened.config.n_layers, 'vocabulary': vocabulary.vocab_size, 'embedding_rows': opened.config.vocab_size,
          'bos': None if vocabulary.bos_id is None else vocabulary.token(vocabulary.bos_id),
          'eos': vocabulary.token(vocabulary.eos_id), 'dtype': dtype, 'license': licence, 'out': str(out)}


def _one_line(stated: Any) -> str:
  """What a file says of itself, on one line: it is written into the comments of a gin file, which must not become gin."""
  return ''.join(letter for letter in ' '.join(str(stated).split()) if letter.isprintable())


def gin_text(config: DecoderConfig, pretrained: dict[str, Any]) -> str:
  """The gin file of a decoder: every field of its shape that is not the default, in the form of gin/models/."""
  plain = DecoderConfig().shape()
  changed = {name: value for name, value in config.shape().items() if value != plain[name]}
  lines = [f'# {pretrained["name"]} ({pretrained["architecture"]}), {pretrained["parameters"]:,} parameters, licence '
           f'{pretrained["license"] or "not stated"}.', '#', '# Required:             nothing',
           '# Commonly overridden:  decoder.remat, decoder.param_dtype, decoder.lora_rank',
           '# Units:                sizes are counts', *(f'decoder.{name} = {value!r}' for name, value in changed.items())]
  return '\n'.join(lines) + '\n'


def _check(source: pathlib.Path, opened: TensorSource, wanted: list[Tensor], vocabulary: TokenizerVocabulary) -> None:
  """Raises UserError unless the source has all tensors, in their shapes, nothing else, and rows for all tokens."""
  names = opened.names()
  if missing := [tensor.name for tensor in wanted if tensor.name not in names]:
    raise UserError(f'{source}: {len(missing)} tensors are missing, such as {missing[0]}; download the model again.')
  for tensor in wanted:
    if opened.shape(tensor.name) != tensor.shape:
      raise UserError(f'{source}: {tensor.name} has the shape {opened.shape(tensor.name)}, by the configuration it is '
                      f'{tensor.shape}; weights and configuration are not of one model.')
  known = {tensor.name for tensor in wanted} | ({'lm_head.weight'} if opened.config.tied_head else set())
  if strange := sorted(names - known):
    raise UserError(f'{source}: {len(strange)} tensors are not of the architecture {opened.architecture}, such as '
                    f'{strange[0]}; an adapter or another kind of model cannot be imported.')
  if vocabulary.vocab_size > opened.config.vocab_size:
    raise UserError(f'{source}: the tokenizer has {vocabulary.vocab_size} ids, the embedding {opened.config.vocab_size} rows; '
                    'take the tokenizer that the model was trained with.')


def _read(opened: TensorSource, wanted: list[Tensor], dtype: str) -> dict[Path, np.ndarray]:
  """All parameters, filled piece by piece."""
  numbers = np.dtype(jnp.bfloat16) if dtype == 'bfloat16' else np.dtype(np.float32)
  params = {path: np.empty(leaf.shape, numbers) for path, leaf in flat_shapes(opened.config).items()}
  for tensor in wanted:
    there = view(params, tensor)
    rows = max(1, _CHUNK // (4 * math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
      there[start:start + rows] = opened.read(tensor.name, start, min(start + rows, tensor.shape[0]))
  return params
