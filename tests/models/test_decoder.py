"""The decoder against a plain numpy one; and causality, packing, rotary positions, remat, dtypes."""

import dataclasses
import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.errors import UserError
from calrec_jax.models import attention
from calrec_jax.models.attention import causal_mask
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import REMAT_POLICIES, DecoderConfig
from calrec_jax.models.rope import frequencies, rotation, scaled

CONFIG = DecoderConfig(vocab_size=23, n_layers=3, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=8, ff_dim=24,
                       dtype='float32')


@functools.cache
def initial(config: DecoderConfig, seed: int = 0, scale: float = 3.0):
  """(decoder, parameters), drawn wide enough that attention is far from uniform, and norm scales differ from 1."""
  decoder = Decoder(config)
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = nn.meta.unbox(jax.jit(decoder.init)(jax.random.key(seed), tokens, tokens + 1, tokens))['params']
  rng = np.random.default_rng(seed)
  return decoder, jax.tree.map(lambda x: x * scale * jnp.asarray(rng.uniform(0.5, 1.0, x.shape), jnp.float32), params)


def row(length: int, seed: int = 0):
  tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (1, length))
  return jnp.asarray(tokens), jnp.ones((1, length), jnp.int32), jnp.arange(length)[None]


# Optimized, as a user's program is: it rounds less than the quick ones of `conftest.py`.
@functools.partial(jax.jit, static_argnums=0, static_argnames=('method', 'train'),
                   compiler_options={'xla_backend_optimization_level': 3})
def hidden(decoder, params, *inputs, **kwargs):
  return decoder.apply({'params': params}, *inputs, **kwargs)


def close(actual, expected, rtol=1e-5):
  """Equal to `rtol`, relative to the largest entry."""
  expected = np.asarray(expected, np.float64)
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=rtol * np.abs(expected).max())


# A plain decoder: one row, no scan, no caches, grouped queries as repeated heads.


def numpy_hidden(params, config: DecoderConfig, tokens_L, positions_L):
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x_LD, scale_D):
    return x_LD / np.sqrt((x_LD**2).mean(-1, keepdims=True) + config.norm_eps) * (scale_D + config.norm_unit_offset)

  def turn(x_LHK, local):
    half = config.head_dim // 2
    local = local and config.local_rope_base is not None
    angle_LK = positions_L[:, None] / (config.local_rope_base if local else config.rope_base) ** (np.arange(half) / half)
    if config.rope_scaling == 'linear' and not local:
      angle_LK = angle_LK / config.rope_factor
    z_LHK = (x_LHK[..., :half] + 1j * x_LHK[..., half:]) * np.exp(1j * angle_LK)[:, None]
    return np.concatenate([z_LHK.real, z_LHK.imag], -1)

  def linear(x, p, formula):
    y = np.einsum(formula, x, p['kernel']) + p.get('bias', 0)
    if 'lora_a' in p:
      a, b = p['lora_a'], p['lora_b']
      product = (a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)).reshape(p['kernel'].shape)
      y = y + np.einsum(formula, x, product) * config.lora_alpha / config.lora_rank
    return y

  def cap(x, most):
    return x if most is None else most * np.tanh(x / most)

  scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
  x_LD = params['embedding'][tokens_L] * (config.embed_dim**0.5 if config.embed_scale else 1)
  for layer in range(config.n_layers):
    local = config.layer_pattern[layer % len(config.layer_pattern)] == 'L'
    p = jax.tree.map(lambda x: x[layer], params['layers'])  # noqa: B023 (called at once)
    a, y_LD = p['attention'], norm(x_LD, p['attention_norm']['scale'])
    q_LHK, k_LGK, v_LGK = (linear(y_LD, a[name], 'ld,dhk->lhk') for name in ('query', 'key', 'value'))
    if config.qk_norm:
      q_LHK, k_LGK = norm(q_LHK, a['query_norm']['scale']), norm(k_LGK, a['key_norm']['scale'])
    q_LHK, k_LGK, out_LHK = turn(q_LHK, local), turn(k_LGK, local), np.zeros_like(q_LHK)
    for head in range(config.n_heads):
      group = head // (config.n_heads // config.n_kv_heads)
      scores_LL = cap(q_LHK[:, head] @ k_LGK[:, group].T * scale, config.attention_softcap)
      seen_LL = np.tril(np.ones_like(scores_LL)) - np.tril(np.ones_like(scores_LL), -config.window if local else -99)
      scores_LL = np.where(seen_LL, scores_LL, -np.inf)
      weights_LL = np.exp(scores_LL - scores_LL.max(-1, keepdims=True))
      out_LHK[:, head] = weights_LL / weights_LL.sum(-1, keepdims=True) @ v_LGK[:, group]
    y_LD = linear(out_LHK, a['out'], 'lhk,hkd->ld')
    x_LD = x_LD + (norm(y_LD, p['post_attention_norm']['scale']) if config.post_norms else y_LD)
    m, y_LD = p['mlp'], norm(x_LD, p['mlp_norm']['scale'])
    gate_LF = linear(y_LD, m['gate'], 'ld,df->lf')
    gelu_LF = gate_LF / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate_LF + 0.044715 * gate_LF**3)))
    gate_LF = gelu_LF if config.activation == 'gelu' else gate_LF / (1 + np.exp(-gate_LF))
    y_LD = linear(gate_LF * linear(y_LD, m['up'], 'ld,df->lf'), m['down'], 'lf,fd->ld')
    x_LD = x_LD + (norm(y_LD, p['post_mlp_norm']['scale']) if config.post_norms else y_LD)
  return norm(x_LD, params['final_norm']['scale'])


@pytest.mark.parametrize('n_kv_heads', [1, 2, 4])
def test_hidden_states_are_those_of_a_plain_decoder_with_repeated_heads(n_kv_heads):
  config = dataclasses.replace(CONFIG, n_kv_heads=n_kv_heads)
  decoder, params = initial(config)
  tokens, segments, positions = row(9)
  expected_LD = numpy_hidden(params, config, np.asarray(tokens[0]), np.asarray(positions[0]))
  close(hidden(decoder, params, tokens, segments, positions)[0], expected_LD)


VARIANTS = {
    'offset': {'norm_unit_offset': True}, 'post_norms': {'post_norms': True}, 'qk_norm': {'qk_norm': True},
    'biases': {'qkv_bias': True, 'out_bias': True, 'mlp_bias': True}, 'gelu': {'activation': 'gelu'},
    'scales': {'query_scale': 0.2, 'embed_scale': True, 'head_dim': 6}, 'softcap': {'attention_softcap': 2.0},
    'linear': {'rope_scaling': 'linear', 'rope_factor': 4.0}, 'local': {'layer_pattern': 'L', 'window': 3},
    'pattern': {'layer_pattern': 'LG', 'window': 2, 'rope_base': 50.0, 'local_rope_base': 5.0, 'rope_scaling': 'linear',
                'rope_factor': 8.0},
    'lora': {'lora_rank': 2, 'lora_alpha': 6.0}}


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_is_that_of_the_plain_decoder(name):
  config = dataclasses.replace(CONFIG, **VARIANTS[name])
  decoder, params = initial(config)
  rng = np.random.default_rng(1)  # what starts at 0 (biases, Gemma's scales, a factor) would prove nothing
  params = jax.tree.map(lambda x: x if x.any() else jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
  tokens, segments, positions = row(9)
  actual_LD = hidden(decoder, params, tokens, segments, positions)[0]
  close(actual_LD, numpy_hidden(params, config, np.asarray(tokens[0]), np.asarray(positions[0])))
  if 'lora' not in name and 'norm' not in name and 'bias' not in name:  # mutants: the same weights without the variant
    with pytest.raises(AssertionError):
      close(actual_LD, numpy_hidden(params, dataclasses.replace(CONFIG, head_dim=config.head_dim), np.asarray(tokens[0]),
                                    np.asarray(positions[0])))


def test_logits_are_capped():
  config = dataclasses.replace(CONFIG, logit_softcap=2.0)
  _, params = initial(config)
  states = hidden(Decoder(CONFIG), params, *row(5))
  plain = np.asarray(hidden(Decoder(CONFIG), params, states, method='logits'))
  close(hidden(Decoder(config), params, states, method='logits'), 2 * np.tanh(plain / 2))
  assert np.abs(plain).max() > 2


def test_wave_lengths_of_llama3_are_kept_below_stretched_above_and_mixed_between():
  config = DecoderConfig(head_dim=64, rope_base=500_000.0, rope_scaling='llama3', rope_factor=32.0)
  plain_K = frequencies(64, 500_000.0)
  length_K, ratio_K = 2 * np.pi / plain_K, plain_K / scaled(plain_K, config)
  np.testing.assert_allclose(ratio_K[length_K < 8192 / 4], 1)
  np.testing.assert_allclose(ratio_K[length_K > 8192], 32)
  between_K = ratio_K[(length_K > 8192 / 4) & (length_K < 8192)]
  assert len(between_K) and ((between_K > 1) & (between_K < 32)).all() and (np.diff(ratio_K) >= 0).all()


def test_the_comparison_sees_other_groups_and_other_positions():
  decoder, params = initial(CONFIG)
  tokens, segments, positions = row(9)
  actual_LD = hidden(decoder, params, tokens, segments, positions)[0]
  swapped = jax.tree.map(lambda x: x, params)
  query, out = (swapped['layers']['attention'][name] for name in ('query', 'out'))
  query['kernel'] = query['kernel'][:, :, np.array([0, 2, 1, 3])]
  out['kernel'] = out['kernel'][:, np.array([0, 2, 1, 3])]
  with pytest.raises(AssertionError):  # heads in turn instead of in runs: h % G, not h // R
    close(actual_LD, numpy_hidden(swapped, CONFIG, np.asarray(tokens[0]), np.arange(9)))
  with pytest.raises(AssertionError):
    close(actual_LD, numpy_hidden(params, CONFIG, np.asarray(tokens[0]), np.zeros(9)))


# Causality and packing.


def input_gradient(mask_of, query: int, segments_BL):
  """How much the hidden state at `query` moves with each position's embedding: float32 [L]."""
  decoder, params = initial(CONFIG)
  length = segments_BL.shape[1]
  tokens_BL, positions_BL = jnp.arange(length)[None] % CONFIG.vocab_size, jnp.arange(length)[None]

  def energy(table_VD):
    hidden_BLD = decoder.apply({'params': {**params, 'embedding': table_VD}}, tokens_BL, segments_BL, positions_BL)
    return jnp.sum(hidden_BLD[0, query] ** 2)

  with mock.patch.object(attention, 'causal_mask', mask_of):
    return np.abs(jax.grad(energy)(params['embedding'])[:length]).max(-1)  # each position has a token of its own


def test_nothing_flows_from_later_tokens_or_other_segments():
  segments_BL = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  for query, sees in ((1, [0, 1]), (2, [0, 1, 2]), (3, [3]), (5, [3, 4, 5]), (6, [3, 4, 5, 6])):
    grad_L = input_gradient(causal_mask, query, segments_BL)
    assert np.flatnonzero(grad_L).tolist() == sees, query
    assert grad_L[sees].min() > 1e-4


def test_the_gradient_finds_a_mask_that_lets_the_future_or_the_neighbour_through():
  segments_BL = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  future = lambda segments_BL: segments_BL[:, :, None] == segments_BL[:, None, :]
  neighbour = lambda segments_BL: jnp.triu(jnp.ones((1, 9, 9), bool))
  assert 5 in np.flatnonzero(input_gradient(future, 4, segments_BL))
  assert 2 in np.flatnonzero(input_gradient(neighbour, 4, segments_BL))


def test_the_mask_of_a_packed_row_as_a_picture():
  expected = np.array([  # a row a key
      [1, 1, 0, 0, 0],
      [0, 1, 0, 0, 0],
      [0, 0, 1, 0, 0],
      [0, 0, 0, 1, 1],
      [0, 0, 0, 0, 1]], bool)
  np.testing.assert_array_equal(causal_mask(jnp.array([[1, 1, 2, 0, 0]]))[0], expected)


def test_packed_segments_have_the_hidden_states_that_they_have_alone():
  decoder, params = initial(CONFIG)
  lengths = (4, 1, 6)
  parts = [row(length, seed) for seed, length in enumerate(lengths)]
  tokens = jnp.concatenate([*(part[0] for part in parts), jnp.full((1, 3), 7)], axis=1)
  segments = jnp.asarray(np.repeat([1, 2, 3, 0], [*lengths, 3]))[None]
  positions = jnp.concatenate([*(part[2] for part in parts), jnp.zeros((1, 3), jnp.int32)], axis=1)
  packed = hidden(decoder, params, tokens, segments, positions)
  alone = jnp.concatenate([hidden(decoder, params, *part) for part in parts], axis=1)
  close(packed[:, :11], alone)
  assert np.isfinite(packed).all()
  with pytest.raises(AssertionError):  # mutant: all of it one segment
    close(hidden(decoder, params, tokens, jnp.ones_like(segments), positions)[:, :11], alone)


# Rotary positions.


def test_rotary_scores_depend_on_the_distance_alone():
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
  config = DecoderConfig(head_dim=8, rope_base=100.0)
  rotate = lambda x, i: rotation(config, jnp.array([[i]])).rotate(x, None)
  score = lambda i, j: jnp.sum(rotate(q, i) * rotate(k, j))
  for shift in (1, 5, 40):
    np.testing.assert_allclose(score(7 + shift, 3 + shift), score(7, 3), rtol=1e-4)
  assert abs(score(7, 3) - score(7, 4)) > 1e-2
  np.testing.assert_allclose(rotate(q, 0), q)


def test_moving_a_whole_segment_changes_nothing_and_moving_half_of_it_does():
  decoder, params = initial(CONFIG)
  tokens, segments, positions = row(8)
  expected = hidden(decoder, params, tokens, segments, positions)
  close(hidden(decoder, params, tokens, segments, positions + 11), expected)
  with pytest.raises(AssertionError):
    close(hidden(decoder, params, tokens, segments, jnp.where(positions > 3, positions + 11, positions)), expected)


# One computation in three guises, and the tree of parameters.


def test_layers_are_an_axis_of_the_parameters_and_every_axis_is_named():
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = Decoder(CONFIG).init(jax.random.key(0), tokens, tokens, tokens)['params']
  boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
  layers = jax.tree.leaves(params['layers'], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert {box.names[0] for box in layers} == {'layers'} and {len(box.value) for box in layers} == {CONFIG.n_layers}
  assert not np.allclose(layers[0].value[0], layers[0].value[1]) or layers[0].names[-1] == 'norm'
  query_LDHK = nn.meta.unbox(params)['layers']['attention']['query']['kernel']
  assert query_LDHK.shape == (3, 16, 4, 8) and not np.allclose(query_LDHK[0], query_LDHK[1])


def test_a_program_does_not_grow_with_the_layers_whatever_their_pattern():
  def program(n_layers, pattern):
    config = dataclasses.replace(CONFIG, n_layers=n_layers, layer_pattern=pattern, window=3 if 'L' in pattern else None)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), *row(4))['params']
    loss = lambda params: jnp.sum(Decoder(config).apply({'params': params}, *row(4)))
    return str(jax.make_jaxpr(jax.grad(loss))(nn.unbox(params))).count('dot_general')
  for pattern in ('G', 'LLLLLG'):
    assert program(6, pattern) == program(26, pattern) > 10  # 26 is no multiple of the pattern


@pytest.mark.parametrize('tied', [True, False])
def test_the_head_is_the_embedding_or_its_own(tied):
  config = dataclasses.replace(CONFIG, tied_head=tied)
  decoder, params = initial(config)
  assert ('head' in params) != tied
  states = hidden(decoder, params, *row(5))
  logits = hidden(decoder, params, states, method='logits')
  table = params['embedding' if tied else 'head']
  close(logits, np.einsum('bld,vd->blv', states, table))
  assert logits.dtype == jnp.float32
  if not tied:
    with pytest.raises(AssertionError):
      close(logits, np.einsum('bld,vd->blv', states, params['embedding']))


def test_rematerialised_gradients_are_the_plain_ones(monkeypatch):
  inputs = row(8)
  def gradient(remat):
    """And how many products the program has."""
    decoder, params = initial(dataclasses.replace(CONFIG, remat=remat))
    loss = lambda params: jnp.mean(decoder.apply({'params': params}, *inputs, train=True) ** 3)
    return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params)).count('dot_general')
  found = {remat: gradient(remat) for remat in ('none', 'dots', 'full')}
  monkeypatch.setitem(REMAT_POLICIES, 'none', jax.checkpoint_policies.everything_saveable)
  plain, products = gradient('none')
  for grads, _ in found.values():
    jax.tree.map(close, grads, plain)
  assert [found[remat][1] - products for remat in ('none', 'dots', 'full')] == [0, 2, 8]  # but down, which no gradient needs


def test_dropout_acts_in_training_alone():
  decoder, params = initial(dataclasses.replace(CONFIG, dropout=0.5))
  inputs = row(6)
  expected = hidden(initial(CONFIG)[0], params, *inputs)
  close(hidden(decoder, params, *inputs), expected)
  train = lambda seed: hidden(decoder, params, *inputs, train=True, rngs={'dropout': jax.random.key(seed)})
  np.testing.assert_array_equal(train(1), train(1))
  for other in (expected, train(2)):
    assert not np.allclose(train(1), other, rtol=1e-2)


def test_bfloat16_is_close_to_float32():
  inputs = row(12)
  decoder, params = initial(CONFIG, scale=1.0)
  half = Decoder(dataclasses.replace(CONFIG, dtype='bfloat16'))
  states = hidden(half, params, *inputs)
  assert states.dtype == jnp.bfloat16 and hidden(half, params, states, method='logits').dtype == jnp.float32
  expected = np.asarray(hidden(decoder, params, *inputs))
  error = np.abs(np.asarray(states, np.float32) - expected).max() / np.abs(expected).max()
  assert 1e-5 < error < 0.05  # bfloat16 has 8 bits: 2**-8 a rounding


@pytest.mark.parametrize('wrong, named', [
    ({'n_heads': 4, 'n_kv_heads': 3}, 'decoder.n_kv_heads'), ({'head_dim': 7}, 'decoder.head_dim'),
    ({'remat': 'some'}, 'decoder.remat'), ({'dtype': 'float16'}, 'decoder.dtype'),
    ({'activation': 'relu'}, 'decoder.activation'),
    ({'layer_pattern': 'GX'}, 'decoder.layer_pattern'), ({'layer_pattern': 'GL'}, 'decoder.window'),
    ({'window': 4}, 'decoder.window'),
    ({'window': 0, 'layer_pattern': 'L'}, 'decoder.window'), ({'lora_rank': -1}, 'decoder.lora_rank'),
    ({'lora_rank': 2, 'lora_targets': ()}, 'decoder.lora_targets'), ({'lora_targets': ('head',)}, 'decoder.lora_targets'),
    ({'rope_scaling': 'llama3', 'rope_low_freq_factor': 4.0}, 'decoder.rope_high_freq_factor')])
def test_a_shape_that_cannot_be_is_refused(wrong, named):
  with pytest.raises(UserError, match=named):
    DecoderConfig(vocab_size=8, **wrong)
