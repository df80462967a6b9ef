"""Decoding layer by layer is the decoder's own forward pass, whatever the branches (law 6)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.layers import TRANSPOSED

V = 13
LOCAL = DecoderConfig(vocab_size=V, n_layers=3, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=8, ff_dim=24, dtype='float32',
                      layer_pattern='LG', window=3)
LENGTHS_U = np.array([4, 6], np.int32)
TOKENS_UP = np.random.default_rng(1).integers(0, V, (2, 6)).astype(np.int32)
# Five branches, of the second user first; three more tokens of each.
USERS_B = np.array([1, 0, 1, 1, 0])
NEW_BS = np.random.default_rng(2).integers(0, V, (5, 3)).astype(np.int32)


@functools.cache
def parameters():
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(Decoder(LOCAL).init)(jax.random.key(3), tokens, tokens + 1, tokens)['params']
  return jax.tree.map(lambda box: 2 * box.value, params, is_leaf=lambda x: hasattr(x, 'value'))


@functools.partial(jax.jit, static_argnames='bos')
def prefill(params, tokens_UP, lengths_U, bos=False):
  return decoding.prefill(Decoder(LOCAL), params, tokens_UP, lengths_U, bos=bos)


def plain(tokens):
  """float32 [L, D] of one sequence by the decoder itself."""
  tokens = jnp.asarray(tokens)[None]
  return np.asarray(Decoder(LOCAL).apply({'params': parameters()}, tokens, jnp.ones_like(tokens),
                                         jnp.arange(tokens.shape[1])[None]))[0]


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_prefill_has_the_last_hidden_state_and_the_mean_of_all():
  params = decoding.by_layer(parameters())
  for bos in (False, True):
    prefix = prefill(params, TOKENS_UP, LENGTHS_U, bos=bos)
    for user, length in enumerate(LENGTHS_U):
      hidden_LD = plain(TOKENS_UP[user, :length])
      close(prefix.last_UD[user], hidden_LD[-1])
      close(prefix.user_UD[user], hidden_LD[int(bos):].mean(0))
    recent = decoding.prefill(Decoder(LOCAL), params, TOKENS_UP, LENGTHS_U, bos=bos, half_life=2.5)
    for user, length in enumerate(LENGTHS_U):
      ages_L = np.arange(length)[::-1][int(bos):]
      close(recent.user_UD[user], np.average(plain(TOKENS_UP[user, :length])[int(bos):], axis=0, weights=0.5**(ages_L / 2.5)))
  assert prefix.caches[0].keys.shape == prefix.caches[0].values.shape == (2, 2, 6, 8)


def extended(steps, of=None):
  """Hidden states of the new tokens, so many at a time."""
  params = decoding.by_layer(parameters())
  prefix = prefill(params, TOKENS_UP, LENGTHS_U)
  of = of or decoding.branches(USERS_B, 2, 3)
  suffix, found, index = decoding.empty_suffix(Decoder(LOCAL), len(USERS_B), 3), [], 0
  for n in steps:
    hidden_BSD, suffix = decoding.extend(Decoder(LOCAL), params, NEW_BS[:, index:index + n], prefix, suffix, of, index)
    found.append(hidden_BSD)
    index += n
  return np.concatenate(found, axis=1)


@pytest.mark.parametrize('steps', [(1, 1, 1), (3,), (1, 2)])
def test_branches_go_on_from_their_users_prefixes(steps):
  found_BSD = extended(steps)
  for branch, user in enumerate(USERS_B):
    prefix = TOKENS_UP[user, :LENGTHS_U[user]]
    close(found_BSD[branch], plain(np.concatenate([prefix, NEW_BS[branch]]))[len(prefix):])


def test_it_fails_when_branches_are_those_of_others():
  of = decoding.branches(1 - USERS_B, 2, 3)
  with pytest.raises(AssertionError):
    np.testing.assert_allclose(extended((3,), of), extended((3,)), rtol=1e-2)


def test_branches_are_numbered_by_user():
  of = decoding.branches(USERS_B, 2, 4)
  assert of.places_B.tolist() == [4, 0, 5, 6, 1]
  assert of.members_UW[0, :2].tolist() == [1, 4] and of.members_UW[1, :3].tolist() == [0, 2, 3]
  assert (of.members_UW.reshape(-1)[of.places_B] == np.arange(5)).all()


def test_layers_are_taken_apart_once():
  params = decoding.by_layer(parameters())
  assert len(params['layers']) == 3 and decoding.by_layer(params)['layers'] is params['layers']
  kernel_LDHK = parameters()['layers']['attention']['query']['kernel']
  np.testing.assert_array_equal(params['layers'][1]['attention']['query'][TRANSPOSED], kernel_LDHK[1].reshape(16, -1).T)
