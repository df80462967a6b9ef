"""Low-rank factors: merged weights compute what the factors did; nothing else is touched."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from calrec_jax.models import lora
from calrec_jax.models.decoder import Decoder, abstract_params
from calrec_jax.models.decoder_config import PROJECTIONS, DecoderConfig

CONFIG = DecoderConfig(vocab_size=23, n_layers=2, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=4, ff_dim=24, dtype='float32',
                       lora_rank=3, lora_alpha=5.0)
TOKENS = jnp.arange(8)[None] + 3


def parameters(config: DecoderConfig):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), abstract_params(config))


def hidden(config, params):
  return jax.jit(Decoder(config).apply)({'params': params}, TOKENS, jnp.ones_like(TOKENS), jnp.arange(8)[None])


@pytest.mark.parametrize('targets', [PROJECTIONS, ('query', 'down')])
def test_merged_weights_compute_what_the_factors_did(targets):
  config = dataclasses.replace(CONFIG, lora_targets=targets)
  params = parameters(config)
  merged, plain = lora.merge(params, config)
  assert plain.lora_rank == 0 and not any('lora' in key for path in traverse_util.flatten_dict(merged) for key in path)
  expected = hidden(config, params)
  np.testing.assert_allclose(hidden(plain, merged), expected, atol=1e-4)
  wrong, _ = lora.merge(params, dataclasses.replace(config, lora_alpha=6.0))  # the mutant: another scale
  assert np.abs(hidden(plain, wrong) - expected).max() > 1e-2


def test_only_the_targets_have_factors_and_these_begin_as_nothing():
  config = dataclasses.replace(CONFIG, lora_targets=('value', 'gate'))
  params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), TOKENS, TOKENS, TOKENS)['params'])
  flat = traverse_util.flatten_dict(params)
  assert {path[-2] for path in flat if path[-1] in lora.FACTORS} == {'value', 'gate'}
  assert flat['layers', 'attention', 'value', 'lora_a'].shape == (2, 16, 3)
  assert flat['layers', 'attention', 'value', 'lora_b'].shape == (2, 3, 2, 4)
  merged, plain = lora.merge(params, config)
  for path, leaf in traverse_util.flatten_dict(merged).items():
    np.testing.assert_array_equal(leaf, flat[path])
  assert plain == lora.plain(CONFIG) == dataclasses.replace(CONFIG, lora_rank=0, lora_alpha=DecoderConfig.lora_alpha)


def test_without_factors_nothing_happens():
  config = dataclasses.replace(CONFIG, lora_rank=0)
  params = parameters(config)
  assert lora.merge(params, config)[0] is params


def test_weights_keep_their_type():
  config = dataclasses.replace(CONFIG, param_dtype='bfloat16', lora_targets=('up',))
  merged, _ = lora.merge(parameters(config), config)
  assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
