"""Useful operations: what a compiler counts where nothing is padded, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.flops import PEAKS, peak_flops, training_flops

CONFIG = DecoderConfig(vocab_size=512, n_layers=1, embed_dim=64, n_heads=4, n_kv_heads=2, head_dim=16, ff_dim=128)


def test_the_compiler_counts_as_many_in_a_forward_pass():
  decoder, tokens = Decoder(CONFIG), jnp.ones((1, 256), jnp.int32)
  params = jax.eval_shape(decoder.init, jax.random.key(0), tokens, tokens, tokens)
  run = lambda params: decoder.apply(params, decoder.apply(params, tokens, tokens, tokens), method=decoder.logits)
  counted = jax.jit(run).lower(params).compile().cost_analysis()['flops']
  # The compiler multiplies half of what no query sees (blocks of 128), and counts norms and softmax too.
  assert counted == pytest.approx(training_flops(CONFIG, np.asarray([256]), 256) / 3, rel=0.15)


def test_attention_is_counted_pair_by_pair():
  one = lambda config, lengths: training_flops(config, np.asarray(lengths), 0)
  per_pair = 3 * 4 * 4 * 16
  weights = 64 * (2 * 64 + 2 * 32 + 3 * 128)
  assert one(CONFIG, [3, 1]) == 3 * 2 * 4 * weights + per_pair * (6 + 1)
  local = dataclasses.replace(CONFIG, n_layers=2, layer_pattern='LG', window=2)
  assert one(local, [4]) == 2 * 3 * 2 * 4 * weights + per_pair * ((1 + 2 + 2 + 2) + 10)
  assert training_flops(CONFIG, np.asarray([], int), 5) == 3 * 2 * 5 * 64 * 512


@pytest.mark.parametrize('kind, peak', [
    ('TPU v5 lite', 197e12), ('TPU v5', 459e12), ('TPU v5p', 459e12), ('TPU v5e', 197e12), ('TPU v6 lite', 918e12),
    ('NVIDIA H100 80GB HBM3', 989e12), ('cpu', None), ('TPU v3', None)])
def test_the_peak_of_a_device(kind, peak):
  assert peak_flops(kind) == peak
  assert all(value > 1e14 for value in PEAKS.values())
