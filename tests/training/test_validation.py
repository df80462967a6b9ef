"""What retrieval is judged by: every held-out user's v_U and every text's v_T are those of the text read by itself."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from calrec_jax.evaluation.dense import dense_metrics
from calrec_jax.inference.generate import prefill
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoding import by_layer
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.ranking.dense import better_and_tied
from calrec_jax.text.batches import OnePass, RowOptions
from calrec_jax.training import partitioning
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import init_params
from calrec_jax.training.trainer import with_vocabulary
from calrec_jax.training.validation import Embedded, Validation


@pytest.fixture(scope='module')
def embedded(tiny_store):
  """(what a judge is given, the model, its parameters, the pass)."""
  inputs, mesh, found = tiny.inputs(tiny_store), MeshShape().build(), []
  model = TwoTower(Decoder(with_vocabulary(tiny.DECODER, inputs)), tiny.OBJECTIVE)
  corpus = inputs.corpus(inputs.load(), 'validation')
  batches = OnePass(corpus, batch_size=8, length=inputs.length, options=RowOptions(targets='last'), max_histories=50)
  params = init_params(model, jax.random.key(0), batches.shapes)
  def judge(embedded):
    found.append(embedded)
    return {'ndcg@10': 0.5}
  validation = Validation(batches, model, mesh, partitioning.shardings(params, mesh), judge)
  assert validation(nn.unbox(params))['ndcg@10'] == 0.5
  return found[0], model, nn.unbox(params), batches


def read_alone(model, params, tokens) -> np.ndarray:
  """Hidden states of one text by itself."""
  tokens_BL = np.asarray([tokens], np.int32)
  hidden = model.apply({'params': params}, tokens_BL, np.ones_like(tokens_BL), np.arange(len(tokens))[None],
                       method=lambda m, *arrays: m.decoder(*arrays))
  return np.asarray(hidden[0], np.float32)


def piece(corpus, start, length) -> np.ndarray:
  return corpus.bank[start:start + length]


def history_of(batches, excerpt) -> np.ndarray:
  """What is read before the target."""
  corpus = batches.corpus
  events = corpus.events[batches.excerpts.starts[excerpt]:batches.excerpts.stops[excerpt]]
  parts = [(corpus.next_prompt if i else corpus.opener, (corpus.item_starts[event], corpus.item_lengths[event]))
           for i, event in enumerate(events)]
  return np.concatenate([piece(corpus, *place) for places in parts for place in places][:-1])


def test_every_user_and_text_is_embedded_as_if_alone(embedded):
  found, model, params, batches = embedded
  corpus = batches.corpus
  chosen = np.concatenate([row for layout in batches.layouts for row in layout.rows])
  assert len(chosen) == len(found.users_ND) == 50 and len(set(chosen.tolist())) == 50
  for number in (0, 7, 49):
    excerpt = chosen[number]
    hidden = read_alone(model, params, history_of(batches, excerpt))
    np.testing.assert_allclose(found.users_ND[number], hidden.mean(0), atol=2e-5)
    target = corpus.events[batches.excerpts.stops[excerpt] - 1]
    assert found.targets_N[number] == corpus.text_ids[target]
    assert found.sources_N[number] == corpus.user_sources[batches.excerpts.users[excerpt]]
  for text in (1, 5, len(found.texts_TD) - 1):
    item = corpus.text_items[text]
    text_tokens = piece(corpus, corpus.item_starts[item], corpus.item_lengths[item])
    expected = read_alone(model, params, text_tokens).mean(0)
    np.testing.assert_allclose(found.texts_TD[text], expected, atol=2e-5)
  assert {source: items.sum() for source, items in found.items_T.items()} == {0: 16, 1: 16}


def test_with_a_half_life_users_are_what_they_bought_lately_in_training_and_inference(embedded):
  _, model, params, batches = embedded
  decoder = Decoder(dataclasses.replace(model.decoder.config, user_half_life=7.0))
  batch = batches.batch(0)
  found = TwoTower(decoder, tiny.OBJECTIVE).apply({'params': params}, batch, method='embed')
  plain = model.apply({'params': params}, batch, method='embed')
  np.testing.assert_array_equal(found.target_BED, plain.target_BED)
  np.testing.assert_array_equal(found.context_BED, plain.context_BED)
  chosen = np.concatenate(batches.layouts[0].rows)
  spans_ND = np.asarray(found.user_BED).reshape(-1, found.user_BED.shape[-1])[batches.spans(0)]
  for number, excerpt in enumerate(chosen[:3].tolist()):
    history = history_of(batches, excerpt)
    hidden = read_alone(model, params, history)
    expected = np.average(hidden, axis=0, weights=0.5**(np.arange(len(hidden))[::-1] / 7))
    np.testing.assert_allclose(spans_ND[number], expected, atol=2e-5)
    assert np.abs(expected - hidden.mean(0)).max() > 1e-3
    prefix = prefill(decoder, by_layer(params['decoder']), history[None], np.asarray([len(history)]), False)
    np.testing.assert_allclose(prefix.user_UD[0], expected, atol=2e-5)


def test_dense_metrics_are_those_of_ranking_all_items_of_ones_own_data_set(embedded):
  found, _, _, batches = embedded
  cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
  corpus, gains, n_seen = batches.corpus, [], 0
  chosen = [excerpt for layout in batches.layouts for row in layout.rows for excerpt in row.tolist()]
  for excerpt, user, target, source in zip(chosen, found.users_ND, found.targets_N, found.sources_N, strict=True):
    items = np.flatnonzero(corpus.item_sources == source).tolist()
    owner = batches.excerpts.users[excerpt]
    *context, bought = corpus.events[corpus.offsets[owner]:corpus.offsets[owner + 1]].tolist()
    scores = {item: cosine(user, found.texts_TD[corpus.text_ids[item]]) for item in items}
    assert corpus.text_ids[bought] == target
    for candidates in (items, [item for item in items if item not in context]):
      better = sum(scores[item] > scores[bought] for item in candidates)
      tied = sum(scores[item] == scores[bought] for item in candidates)
      ranks = range(better + 1, better + tied + 1)
      gains.append((np.mean([rank <= 10 for rank in ranks]), np.mean([(rank <= 10) / np.log2(rank + 1) for rank in ranks])))
      n_seen += len(items) - len(candidates)
  assert n_seen > 50 and not found.repeats_N.any()
  (recall, ndcg), (unseen_recall, unseen_ndcg) = (np.mean(gains[first::2], axis=0) for first in (0, 1))
  assert dense_metrics(found) == pytest.approx({'recall@10': recall, 'ndcg@10': ndcg, 'recall@10_unseen': unseen_recall,
                                                'ndcg@10_unseen': unseen_ndcg}, abs=1e-9)
  assert unseen_ndcg > ndcg


def test_among_unseen_items_a_target_that_was_bought_before_is_missed():
  texts = np.eye(30, dtype=np.float32)
  found = dense_metrics(Embedded(texts[[3, 3]], np.asarray([3, 3]), np.zeros(2, int), [np.zeros(0, int)] * 2,
                                 np.asarray([False, True]), texts, {0: np.ones(30, int)}))
  assert found == {'recall@10': 1, 'ndcg@10': 1, 'recall@10_unseen': 0.5, 'ndcg@10_unseen': 0.5}


def test_items_with_one_text_are_tied_and_others_do_not_count():
  users = np.asarray([[1.0, 0.0], [0.0, 2.0]] * 300, np.float32)
  texts = np.asarray([[9, 9], [1, 0], [1, 1], [0, 1], [1, 0.1]], np.float32)
  better, tied = better_and_tied(users, texts, np.asarray([0, 2, 3, 1, 0]), np.asarray([2, 1] * 300))
  assert better.tolist() == [2, 4] * 300 and tied.tolist() == [2, 1] * 300
  seen = [np.asarray([2, 1, 3]), np.asarray([2])] * 300  # an item of each of these texts does not count
  better, tied = better_and_tied(users, texts, np.asarray([0, 2, 3, 1, 0]), np.asarray([2, 1] * 300), seen)
  assert better.tolist() == [1, 3] * 300 and tied.tolist() == [1, 1] * 300
