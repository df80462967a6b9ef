"""Scores are the log-probabilities of transformers; BOS is read where the vocabulary has one."""

import numpy as np
import pretrained_models
import pytest
import torch

from calrec_jax.errors import UserError
from calrec_jax.inference.loading import load
from calrec_jax.inference.score import score, score_text
from calrec_jax.pretrained.importing import import_model


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  folder = tmp_path_factory.mktemp('score')
  model = pretrained_models.make('gemma2')
  import_model(pretrained_models.save(model, folder / 'hf'), folder / 'plain')
  import_model(folder / 'hf', folder / 'begun', bos_token='<pad>')
  return model, load(folder / 'plain', dtype='float32'), load(folder / 'begun', dtype='float32')


def expected(model, ids):
  logprobs = torch.log_softmax(torch.tensor(pretrained_models.logits(model, ids)), -1).numpy()
  return logprobs[np.arange(len(ids) - 1), ids[1:]]


def test_scores_are_those_of_transformers(imported):
  model, plain, begun = imported
  report = score_text(plain, 'ABCZA')
  assert report['token_ids'] == [2, 3, 4, 27, 2] and report['tokens'] == list('ABCZA') and report['logprobs'][0] is None
  np.testing.assert_allclose(report['logprobs'][1:], expected(model, [2, 3, 4, 27, 2]), atol=1e-4)
  report = score_text(begun, 'ABCZA')
  assert report['token_ids'] == [0, 2, 3, 4, 27, 2] and report['tokens'][0] == '<pad>' and len(report['logprobs']) == 6
  np.testing.assert_allclose(report['logprobs'][1:], expected(model, [0, 2, 3, 4, 27, 2]), atol=1e-4)


def test_padding_to_a_bucket_moves_nothing(imported):
  model, plain, _ = imported
  ids = np.random.default_rng(0).integers(2, 37, 61).tolist()  # more than a window, and than a bucket with the next
  np.testing.assert_allclose(score(plain.decoder, plain.params, ids), expected(model, ids), atol=2e-4)
  assert score(plain.decoder, plain.params, ids[:1]).shape == (0,)


def test_an_empty_text_is_refused_unless_there_is_a_bos(imported):
  _, plain, begun = imported
  with pytest.raises(UserError, match='--text: is empty'):
    score_text(plain, '')
  assert score_text(begun, '')['logprobs'] == [None]
