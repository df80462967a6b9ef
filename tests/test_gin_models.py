"""Each gin/models file is the published model: its shape, and its number of parameters."""

import math
import pathlib

import gin
import jax
import pytest
import torch
import transformers
from published_models import PUBLISHED

from calrec_jax import configurables
from calrec_jax.models.decoder import abstract_params
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.pretrained import families

FILES = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / 'gin/models').glob('*.gin'))


def decoder(name: str) -> DecoderConfig:
  configurables.parse([f'gin/models/{name}.gin'], [], [])
  try:
    return gin.get_configurable('calrec.decoder')()
  finally:
    gin.clear_config()


def test_every_file_is_of_a_published_model_or_the_tiny_one():
  assert FILES == sorted([*PUBLISHED, 'tiny'])


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_file_has_the_published_shape_and_number_of_parameters(name):
  parameters, hf = PUBLISHED[name]
  config = decoder(name)
  assert config == families.to_config(hf, name)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config))) == parameters
  assert f'{parameters:,}' in (pathlib.Path(__file__).parents[1] / f'gin/models/{name}.gin').read_text()


@pytest.mark.parametrize('name', PUBLISHED)
def test_transformers_counts_as_many(name):
  parameters, hf = PUBLISHED[name]
  text = hf.get('text_config', hf)
  config = transformers.AutoConfig.for_model(**text)
  with torch.device('meta'):
    model = transformers.AutoModelForCausalLM.from_config(config)
  model.tie_weights()
  assert model.num_parameters() == parameters


def test_the_published_shapes_export_as_they_were():
  for name, (_, hf) in PUBLISHED.items():
    family, keys = families.from_config(decoder(name))
    assert family.model_type == hf.get('text_config', hf)['model_type']
    assert families.to_config(keys, name) == decoder(name)
