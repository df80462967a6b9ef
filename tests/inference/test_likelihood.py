"""Likelihoods of candidates are those of plain full forward passes, whatever blocks, lengths and users (law 7's other side)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.inference import likelihood as module
from calrec_jax.inference.likelihood import log_likelihoods
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig

V, EOS, LONGEST = 14, 1, 17
DECODER = Decoder(DecoderConfig(vocab_size=V, n_layers=2, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=4, ff_dim=16,
                                dtype='float32', layer_pattern='LG', window=5))
# Three users of different lengths. The padding is made of ordinary tokens: nothing may infer it from an id.
LENGTHS_U = np.array([3, 8, 5], np.int32)
TOKENS_UP = np.random.default_rng(0).integers(2, V, (3, 8)).astype(np.int32)
ROWS = 64  # of a plain pass


@functools.cache
def parameters():
  """Wide weights: attention is far from uniform, and texts differ."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = nn.meta.unbox(jax.jit(DECODER.init)(jax.random.key(3), tokens, tokens + 1, tokens))['params']
  return jax.tree.map(lambda x: 2 * x, params)


@functools.cache
def prefix():
  read = jax.jit(functools.partial(decoding.prefill, DECODER, bos=False))
  return read(decoding.by_layer(parameters()), TOKENS_UP, LENGTHS_U)


@jax.jit
def plain(params, tokens_RL):
  positions_RL = jnp.broadcast_to(jnp.arange(tokens_RL.shape[1])[None], tokens_RL.shape)
  hidden_RLD = DECODER.apply({'params': params}, tokens_RL, jnp.ones_like(tokens_RL), positions_RL)
  return jax.nn.log_softmax(DECODER.apply({'params': params}, hidden_RLD, method='logits'), axis=-1)


def expected(tokens_UCS, lengths_UC, *, end=True):
  """By the decoder's own forward pass over prefix, text and end; `end`: whether the end counts."""
  U, C, _ = tokens_UCS.shape
  rows_RL, spans = np.zeros((U * C, 8 + LONGEST + 1), np.int32), []
  for row, (user, candidate) in zip(rows_RL, np.ndindex(U, C), strict=True):
    start, n = LENGTHS_U[user], lengths_UC[user, candidate]
    row[:start + n + 1] = [*TOKENS_UP[user, :start], *tokens_UCS[user, candidate, :n], EOS]
    spans.append((start, start + n + int(end)) if n else None)
  blocks = [np.pad(rows_RL[i:i + ROWS], ((0, max(i + ROWS - len(rows_RL), 0)), (0, 0))) for i in range(0, len(rows_RL), ROWS)]
  logprobs_RLV = np.concatenate([np.asarray(plain(parameters(), block), np.float64) for block in blocks])
  found = [-np.inf if span is None else sum(logprobs_LV[place - 1, row[place]] for place in range(*span))
           for span, row, logprobs_LV in zip(spans, rows_RL, logprobs_RLV, strict=False)]
  return np.reshape(found, (U, C))


def found(tokens_UCS, lengths_UC, eos_id=EOS):
  return log_likelihoods(DECODER, decoding.by_layer(parameters()), prefix(), tokens_UCS, lengths_UC, eos_id=eos_id)


def candidates(seed, C, S=LONGEST):
  """Random texts, of which each user's first is the shortest, the last the longest, and another one none."""
  rng = np.random.default_rng(seed)
  lengths_UC = rng.integers(0, S + 1, (3, C)).astype(np.int32)
  lengths_UC[:, 0], lengths_UC[:, -1] = 1, S
  return rng.integers(2, V, (3, C, S)).astype(np.int32), lengths_UC


def close(actual, wanted):
  np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(('C', 'S'), [(1, 1), (33, 17)])
def test_likelihoods_are_those_of_plain_passes_with_the_end(C, S):
  tokens_UCS, lengths_UC = candidates(C, C, S)
  actual_UC = found(tokens_UCS, lengths_UC)
  assert actual_UC.shape == (3, C) and actual_UC.dtype == np.float32
  close(actual_UC, expected(tokens_UCS, lengths_UC))
  with pytest.raises(AssertionError):
    close(actual_UC, expected(tokens_UCS, lengths_UC, end=False))


@pytest.mark.parametrize(('block', 'positions'), [(2, 7)])
def test_blocks_change_nothing(monkeypatch, block, positions):
  tokens_UCS, lengths_UC = candidates(0, 7)
  monkeypatch.setattr(module, 'CANDIDATES', block)
  monkeypatch.setattr(module, 'POSITIONS', positions)
  close(found(tokens_UCS, lengths_UC), expected(tokens_UCS, lengths_UC))


TEXTS = st.lists(st.lists(st.integers(2, V - 1), max_size=LONGEST), min_size=12, max_size=12)


@settings(max_examples=15, deadline=None)
@given(TEXTS, st.integers(2, V - 1))
def test_any_texts_and_any_padding(texts, padding):
  tokens_UCS = np.full((3, 4, LONGEST), padding, np.int32)
  for row, text in zip(tokens_UCS.reshape(12, LONGEST), texts, strict=True):
    row[:len(text)] = text
  lengths_UC = np.array([len(text) for text in texts], np.int32).reshape(3, 4)
  actual_UC = found(tokens_UCS, lengths_UC)
  assert (np.isneginf(actual_UC) == (lengths_UC == 0)).all()
  close(actual_UC, expected(tokens_UCS, lengths_UC))


def test_it_fails_where_candidates_are_those_of_other_users(monkeypatch):
  tokens_UCS, lengths_UC = candidates(1, 5)
  wanted_UC = expected(tokens_UCS, lengths_UC)
  close(found(tokens_UCS, lengths_UC), wanted_UC)
  with pytest.raises(AssertionError):
    close(found(tokens_UCS, lengths_UC, eos_id=2), wanted_UC)
  branches = decoding.branches
  monkeypatch.setattr(module.decoding, 'branches', lambda users_B, n, width: branches(n - 1 - users_B, n, width))
  with pytest.raises(AssertionError):
    close(found(tokens_UCS, lengths_UC), wanted_UC)


def test_no_candidates_at_all():
  assert found(np.zeros((3, 0, 4), np.int32), np.zeros((3, 0), np.int32)).shape == (3, 0)
  assert np.isneginf(found(np.zeros((3, 4, 16), np.int32), np.zeros((3, 4), np.int32))).all()
