"""Law 10: imported weights give the logits of the original implementation, and exported ones give them back."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import numpy as np
import pretrained_models
import pytest
import torch
import transformers

from calrec_jax.inference.generate import prefill
from calrec_jax.inference.loading import Loaded, load
from calrec_jax.inference.sampling import sample
from calrec_jax.models.decoder import Decoder
from calrec_jax.pretrained.exporting import export_model
from calrec_jax.pretrained.importing import import_model

LENGTHS = (13, 9, 6)  # longer than every window
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(2, 37, length) for length in LENGTHS]


@functools.cache
def imported(name: str) -> tuple[object, Loaded]:
  """(the original, what its import gives)."""
  model = pretrained_models.make(name)
  with tempfile.TemporaryDirectory() as name_of_folder:
    folder = pathlib.Path(name_of_folder)
    source = pretrained_models.save(model, folder / 'hf', **({'max_shard_size': '8KB'} if name == 'llama' else {}))
    import_model(source, folder / 'checkpoint')
    return model, load(folder / 'checkpoint', dtype='float32')


@functools.partial(jax.jit, static_argnums=0)
def logits(decoder: Decoder, params, tokens_BL, segments_BL, positions_BL):
  hidden_BLD = decoder.apply({'params': params}, tokens_BL, segments_BL, positions_BL)
  return decoder.apply({'params': params}, hidden_BLD, method='logits')


def padded_and_packed(decoder: Decoder, params) -> list[list[np.ndarray]]:
  """The logits of each text, in a batch with padding, and in one packed row."""
  rows = np.zeros((3, 3, sum(LENGTHS) + 2), np.int32)  # tokens, segments, positions of three rows
  packed = np.zeros((3, 1, sum(LENGTHS) + 2), np.int32)
  starts = np.cumsum([0, *LENGTHS])
  for i, text in enumerate(TEXTS):
    values = (text, i + 1, np.arange(len(text)))
    for kind, value in enumerate(values):
      rows[kind, i, :len(text)] = value if kind != 1 else 1
      packed[kind, 0, starts[i]:starts[i] + len(text)] = value
  one, other = np.asarray(logits(decoder, params, *rows)), np.asarray(logits(decoder, params, *packed))
  return [[one[i, :n] for i, n in enumerate(LENGTHS)], [other[0, starts[i]:starts[i] + n] for i, n in enumerate(LENGTHS)]]


def check(model: object, decoder: Decoder, params) -> None:
  expected = [pretrained_models.logits(model, text) for text in TEXTS]
  assert np.concatenate(expected).std() >= 1
  for actual in padded_and_packed(decoder, params):
    for ours, theirs in zip(actual, expected, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', pretrained_models.MODELS)
def test_imported_weights_give_the_logits_of_the_original(name):
  model, loaded = imported(name)
  check(model, loaded.decoder, loaded.params)


MUTANTS = [
    ('llama', {'rope_base': 9_000.0}), ('llama', {'norm_eps': 1e-1}), ('llama_3', {'rope_scaling': 'none'}),
    ('llama_3', {'rope_original_length': 32}), ('qwen2_windows', {'window': 5}), ('gemma', {'norm_unit_offset': False}),
    ('gemma', {'embed_scale': False}), ('gemma', {'activation': 'silu'}), ('gemma2', {'attention_softcap': None}),
    ('gemma2', {'logit_softcap': None}), ('gemma2', {'query_scale': None}), ('gemma3', {'layer_pattern': 'LG'}),
    ('gemma3', {'local_rope_base': None}), ('gemma3', {'rope_factor': 4.0})]


@pytest.mark.parametrize('name, wrong', MUTANTS)
def test_law_10_fails_for_another_decoder(name, wrong):
  model, loaded = imported(name)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    check(model, Decoder(dataclasses.replace(loaded.decoder.config, **wrong)), loaded.params)


@pytest.mark.parametrize('name', pretrained_models.MODELS)
def test_exported_weights_give_the_same_logits_in_transformers(name, tmp_path):
  model = pretrained_models.make(name)
  import_model(pretrained_models.save(model, tmp_path / 'hf'), tmp_path / 'checkpoint')
  report = export_model(tmp_path / 'checkpoint', tmp_path / 'out', max_shard_bytes=10_000 if name == 'gemma3' else 1 << 30)
  assert (report['files'] > 1) == (name == 'gemma3')
  exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager')
  assert type(exported) is type(model)
  for text in TEXTS:
    np.testing.assert_array_equal(pretrained_models.logits(exported, text), pretrained_models.logits(model, text))


@pytest.mark.parametrize('name', ['llama', 'llama_3', 'qwen2_windows', 'qwen3', 'gemma', 'gemma2', 'gemma3'])
def test_greedy_generation_agrees_token_by_token(name):
  model, loaded = imported(name)
  tokens_UP = np.zeros((3, 16), np.int32)
  for row_P, text in zip(tokens_UP, TEXTS, strict=True):
    row_P[:len(text)] = text
  eos = 1
  prefix = prefill(loaded.decoder, loaded.by_layer, tokens_UP, np.array(LENGTHS, np.int32), False)
  ours = sample(loaded.decoder, loaded.by_layer, prefix, np.zeros((3, 2), np.uint32), n_samples=1, temperature=0,
                max_new_tokens=10, eos_id=eos)
  for user, text in enumerate(TEXTS):
    with torch.no_grad():
      theirs = model.generate(torch.tensor(text[None]), max_new_tokens=10, do_sample=False, eos_token_id=eos, pad_token_id=eos,
                              attention_mask=torch.ones(1, len(text)))[0, len(text):].tolist()
    theirs = theirs[:theirs.index(eos)] if eos in theirs else theirs
    assert ours.tokens_UNT[user, 0, :ours.lengths_UN[user, 0]].tolist() == theirs
