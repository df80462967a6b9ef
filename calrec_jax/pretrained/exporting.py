"""Exports a checkpoint as a Hugging Face folder: what `importing` reads, and transformers loads."""

import os
import pathlib
from typing import Any

import numpy as np
from flax import traverse_util

from calrec_jax import __version__, outputs
from calrec_jax.inference.loading import Loaded, load
from calrec_jax.pretrained import families, model_card
from calrec_jax.pretrained.safetensors_files import read_json, write_shards
from calrec_jax.pretrained.tensors import tensors, view
from calrec_jax.training import checkpoints

MAX_SHARD_BYTES = 5_000_000_000


def export_model(checkpoint: str | os.PathLike, out: str | os.PathLike, *, metrics: str | os.PathLike | None = None,
                 max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, Any]:
  """Writes the folder `out`: `config.json`, safetensors, the tokenizer, `generation_config.json`, and a model card.

  Low-rank factors are merged into the weights. The weights keep the type of the checkpoint's.

  Args:
    checkpoint: a run's folder (its newest step), an imported model, or the folder of one step.
    out: the folder to write.
    metrics: a `metrics.json` that `calrec evaluate` wrote, for the model card.
    max_shard_bytes: a file of weights is no larger, unless it holds one tensor.

  Returns:
    `architecture`, `parameters`, `dtype`, `files` (of weights), `out`.

  Raises:
    UserError: no checkpoint, a damaged one, a shape that no architecture of transformers has, no such metrics, `out` is there.
  """
  outputs.check_unused(out)
  judged = None if metrics is None else read_json(pathlib.Path(metrics), 'give a metrics.json that `calrec evaluate` wrote')
  dtype = checkpoints.stored_dtype(checkpoints.find(checkpoint))
  loaded = load(checkpoint, param_dtype=dtype)
  config = loaded.decoder.config
  family, keys = families.from_config(config)
  params = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(loaded.params).items()}
  wanted = {tensor.name: tensor for tensor in tensors(config)}
  with outputs.new_folder(out) as folder:
    outputs.write_json(folder / 'config.json', keys | _facts(loaded, dtype))
    outputs.write_json(folder / 'generation_config.json', _special_ids(loaded))
    loaded.vocabulary.write_huggingface(folder)
    files = write_shards(folder, [(tensor.name, tensor.shape) for tensor in wanted.values()],
                         lambda name: view(params, wanted[name]), dtype, max_shard_bytes=max_shard_bytes)
    (folder / 'README.md').write_text(model_card.write(loaded.found, judged), encoding='utf-8')
  return {'architecture': family.model_type, 'parameters': sum(leaf.size for leaf in params.values()), 'dtype': dtype,
          'files': files, 'out': str(out)}


def _special_ids(loaded: Loaded) -> dict[str, int]:
  vocabulary = loaded.vocabulary
  return {'eos_token_id': vocabulary.eos_id} | ({} if vocabulary.bos_id is None else {'bos_token_id': vocabulary.bos_id})


def _facts(loaded: Loaded, dtype: str) -> dict[str, Any]:
  """What a `config.json` says besides the decoder's shape."""
  pretrained = loaded.found.description.get('pretrained') or {}
  longest = max(pretrained.get('max_position_embeddings', 0), sum(loaded.lengths.values()))
  return {'torch_dtype': dtype, 'max_position_embeddings': longest,
          'calrec_jax_version': __version__, 'pad_token_id': None, **_special_ids(loaded)}
