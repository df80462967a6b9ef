"""Loads a checkpoint to be read from: the decoder, its parameters and its vocabulary."""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.models import decoding, lora
from calrec_jax.models.decoder import Decoder, abstract_params
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import TokenizerVocabulary, load_vocabulary
from calrec_jax.training import checkpoints

_LENGTHS = {'inputs': 448, 'targets': 64}  # of a checkpoint that was imported, and never trained here


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A checkpoint, ready: low-rank factors are merged.

  Attributes:
    found: the checkpoint on disk.
    decoder: the decoder.
    params: its parameters, unboxed.
    vocabulary: the one that it was trained with.
    template: how an item becomes text; the default one for a checkpoint that was imported.
    lengths: the most tokens of a prefix (`inputs`) and of an item (`targets`).
  """

  found: checkpoints.Found
  decoder: Decoder
  params: Any
  vocabulary: TokenizerVocabulary
  template: ItemTemplate
  lengths: dict[str, int]

  @functools.cached_property
  def by_layer(self) -> dict[str, Any]:
    """The parameters as decoding wants them."""
    return decoding.by_layer(self.params)

  @functools.cached_property
  def weights(self) -> str:
    """The parameters' fingerprint."""
    return fingerprint(self.params)


def fingerprint(params: Any) -> str:
  """sha256 hex of a tree of arrays."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def load(checkpoint: str | pathlib.Path, *, dtype: str = 'auto', param_dtype: str = 'float32') -> Loaded:
  """Loads a run's newest checkpoint, or one step's folder, onto one device.

  Args:
    checkpoint: the folder.
    dtype: of the computation, see `DecoderConfig`.
    param_dtype: of the parameters.

  Raises:
    UserError: no checkpoint, a damaged one, or another vocabulary beside it.
  """
  found = checkpoints.find(checkpoint)
  vocabulary = load_vocabulary(found.vocabulary_path)
  if vocabulary.fingerprint != found.description['vocabulary']:
    raise UserError(f'{found.vocabulary_path}: is not the vocabulary that the checkpoint was trained with; restore the file.')
  config = found.decoder_config(dtype=dtype, param_dtype=param_dtype)
  shapes, one = {'decoder': abstract_params(config)}, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  there = checkpoints.abstract(shapes, jax.tree.map(lambda _: one, shapes))
  params, config = lora.merge(checkpoints.load(found, params=there)['params']['decoder'], config)
  template = found.description['template']
  return Loaded(found, Decoder(config), params, vocabulary, ItemTemplate(**template) if template else ItemTemplate(),
                found.description['task_feature_lengths'] or _LENGTHS)
