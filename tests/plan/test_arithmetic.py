"""Operations counted in a traced program are those that are written down."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tiny import DECODER

from calrec_jax.models.decoder import Decoder
from calrec_jax.models.flops import training_flops
from calrec_jax.plan.arithmetic import product_flops

A, B, C = 5, 7, 11


def count(function, *shapes, **options):
  return product_flops(jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)), **options)


def test_a_product_takes_two_operations_a_term():
  assert count(jnp.matmul, (A, B), (B, C)) == 2 * A * B * C
  assert count(lambda x, y: jnp.einsum('nab,nbc->nac', x, y), (3, A, B), (3, B, C)) == 3 * 2 * A * B * C


def test_loops_count_as_often_as_they_run():
  scan = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
  assert count(scan, (A, B), (9, B, B)) == 9 * 2 * A * B * B
  def unknown(x, n):
    return jax.lax.while_loop(lambda c: c[1] < n, lambda c: (c[0] @ c[0], c[1] + 1), (x, 0.0))[0]
  assert count(unknown, (B, B), (), unknown_trips=4) == 4 * 2 * B**3


def test_of_a_choice_each_branch_counts_its_share():
  either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)
  assert count(either, (B, B)) == B**3


def test_what_is_computed_anew_counts():
  product = lambda x: jnp.sum(jnp.sin(x @ x))
  assert count(jax.grad(product), (B, B)) == 3 * 2 * B**3
  assert count(jax.grad(jax.checkpoint(product)), (B, B)) == 4 * 2 * B**3


def test_a_decoder_has_the_operations_that_its_shape_says():
  """Attention apart: `training_flops` counts what is seen, a program whole blocks."""
  config, tokens = dataclasses.replace(DECODER, vocab_size=64, attention='packed'), jnp.zeros((2, 32), jnp.int32)
  decoder = Decoder(config)
  params = jax.eval_shape(decoder.init, jax.random.key(0), tokens, tokens, tokens)
  found = product_flops(jax.jit(lambda params: decoder.apply(params, tokens, tokens, tokens)).trace(params))
  whole = training_flops(config, np.full(2, 32), 0) / 3
  attention = 4 * config.n_heads * config.head_dim * config.n_layers * 2
  assert found == whole - attention * 32 * 33 / 2 + attention * 32 * 32
