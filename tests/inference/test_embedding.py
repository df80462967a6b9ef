"""v_T of a text read alone: the mean of the decoder's own hidden states, BOS left out, whatever the batch; that of training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calrec_jax.inference import embedding as module
from calrec_jax.inference.embedding import embed_texts
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower

V, BOS = 20, 7
DECODER = Decoder(DecoderConfig(vocab_size=V, n_layers=2, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=4, ff_dim=16,
                                dtype='float32'))
LONGEST = 30  # two lengths of program: 16 and 32
PADDED = 32  # of a plain pass


@functools.cache
def parameters():
  tokens = jnp.zeros((1, 4), jnp.int32)
  return nn.meta.unbox(jax.jit(DECODER.init)(jax.random.key(1), tokens, tokens + 1, tokens))['params']


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  """Batches of 4 and 2 texts."""
  monkeypatch.setattr(module, 'TOKENS', 64)


@jax.jit
def hidden(params, tokens_L, segments_L):
  return DECODER.apply({'params': params}, tokens_L[None], segments_L[None], jnp.arange(len(tokens_L))[None])[0]


def expected(text, bos_id=None):
  """float64 [D], by the decoder's own forward pass over the text alone."""
  tokens = np.asarray([*([] if bos_id is None else [bos_id]), *text], np.int32)
  tokens_L = np.pad(tokens, (0, PADDED - len(tokens)))
  hidden_LD = np.asarray(hidden(parameters(), tokens_L, (np.arange(PADDED) < len(tokens)).astype(np.int32)), np.float64)
  return hidden_LD[len(tokens) - len(text):len(tokens)].mean(axis=0)


def texts_of(seed, n):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, V, length).astype(np.int32) for length in [1, LONGEST, 16, 15, *rng.integers(1, LONGEST, n - 4)]]


def embed(texts, bos_id=None):
  return embed_texts(DECODER, decoding.by_layer(parameters()), texts, bos_id=bos_id)


def close(actual, wanted):
  np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('bos_id', [None, BOS])
def test_it_is_the_mean_of_the_hidden_states_without_bos(bos_id):
  texts = texts_of(0, 23)
  actual_TD = embed(texts, bos_id)
  assert actual_TD.dtype == np.float32 and actual_TD.shape == (23, 16)
  close(actual_TD, [expected(text, bos_id) for text in texts])
  with pytest.raises(AssertionError):  # with BOS in the mean
    close(actual_TD, [expected([BOS, *text]) for text in texts])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=LONGEST), min_size=1, max_size=8), st.randoms())
def test_other_texts_of_the_batch_change_nothing(texts, random):
  texts = [np.asarray(text, np.int32) for text in texts]
  order = list(range(len(texts)))
  random.shuffle(order)
  together_TD = embed(texts, BOS)
  np.testing.assert_array_equal(together_TD[order], embed([texts[text] for text in order], BOS))
  close(together_TD[0], expected(texts[0], BOS))


def test_the_size_of_a_batch_changes_nothing(monkeypatch):
  texts = texts_of(1, 9)
  wanted_TD = embed(texts)
  monkeypatch.setattr(module, 'TOKENS', 1)  # one by one, although each has more tokens
  close(embed(texts), wanted_TD)


def test_it_is_the_towers_v_t():
  """As in training: several texts packed in a row, each with BOS."""
  texts = texts_of(2, 4)
  pieces = [[BOS, *text] for text in texts]
  tokens_L = np.concatenate(pieces)
  fill = lambda parts: jnp.asarray(np.pad(np.concatenate(parts), (0, 80 - len(tokens_L)))[None], jnp.int32)
  batch = {'alone_tokens': fill(pieces), 'alone_positions': fill([range(len(piece)) for piece in pieces]),
           'alone_segments': fill([[number + 1] * len(piece) for number, piece in enumerate(pieces)]),
           'slot_texts': jnp.arange(4)[None]}
  towers = TwoTower(DECODER, Objective(), bos=True)
  slots_BSD = towers.apply({'params': {'decoder': parameters()}}, batch, method='embed_texts')
  close(embed(texts, BOS), slots_BSD[0])
  with pytest.raises(AssertionError):
    close(embed(texts), slots_BSD[0])


def test_no_texts_have_no_embeddings():
  assert embed([]).shape == (0, 16)
