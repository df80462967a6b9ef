"""Laws 1 and 2: packed = unpacked, one pass = prefixes written out; padding, chunks and later tokens move nothing."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_corpus import random_corpus

from calrec_jax.models import attention, head, packed_attention, two_tower
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import OnePass, RowOptions
from calrec_jax.text.corpus import Corpus, Excerpts, excerpts
from calrec_jax.text.rows import BatchLayout, Shapes, build_rows, target_texts

CONFIG = DecoderConfig(vocab_size=40, n_layers=2, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=8, ff_dim=24,
                       dtype='float32')
EQUAL_WEIGHTS = Objective(alpha=0.3, beta=0.3)  # so that no term hides behind another
BOS = 4


@functools.cache
def params():
  """Drawn as they are for training: queries and keys of unit variance, so that attention is far from uniform."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  return {'decoder': nn.unbox(jax.jit(Decoder(CONFIG).init)(jax.random.key(0), tokens, tokens, tokens))['params']}


@dataclasses.dataclass
class Batch:
  """Rows, and of which excerpt each segment is."""

  arrays: dict[str, np.ndarray]
  layout: BatchLayout
  cut: Excerpts

  def span_keys(self) -> dict[tuple[int, int], tuple[int, int]]:
    """(user, number of the target) -> (row, span)."""
    a, keys = self.arrays, {}
    for row, span in zip(*np.nonzero(a['span_texts']), strict=True):
      excerpt = self.layout.rows[row][a['span_segments'][row, span] - 1]
      keys[int(self.cut.users[excerpt]), int(a['span_items'][row, span])] = (row, span)
    return keys

  def change(self, **arrays) -> 'Batch':
    return dataclasses.replace(self, arrays=self.arrays | arrays)


@dataclasses.dataclass
class Result:
  terms: dict[str, jax.Array]
  grads: dict
  towers: dict[tuple[int, int], np.ndarray]  # of each span: v_U, v_T|U and v_T, [3, D]


def _computation(bos, objective, head_block, longest):
  model = TwoTower(Decoder(CONFIG), objective, bos, head_block, *longest)
  def all_of_it(params, arrays):
    apply = lambda params: model.apply({'params': params}, arrays)
    return jax.value_and_grad(apply, has_aux=True)(params), model.apply({'params': params}, arrays, method='embed')
  return jax.jit(all_of_it)


_computation_once = functools.cache(_computation)


def run(batch: Batch, *, bos=False, objective=EQUAL_WEIGHTS, head_block=head.BLOCK, longest=(None, None),
        patched=False) -> Result:
  """`patched`: the code was changed for a mutant, so it is traced anew."""
  compute = (_computation if patched else _computation_once)(bos, objective, head_block, longest)
  ((_, terms), grads), t = compute(params(), batch.arrays)
  stacked = np.stack([t.user_BED, t.context_BED, t.target_BED], axis=2)
  return Result(terms, grads, {key: stacked[at] for key, at in batch.span_keys().items()})


def close(actual, expected, rtol=1e-5):
  """Equal to `rtol`, relative to the largest entry."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def check_loss_and_gradient(actual: Result, expected: Result):
  for name in ('loss', 'nig', 'tt', 'ut'):
    np.testing.assert_allclose(actual.terms[name], expected.terms[name], rtol=1e-5, err_msg=name)
  assert all(actual.terms[name] == expected.terms[name] for name in ('spans', 'target_tokens'))
  jax.tree.map(close, actual.grads, expected.grads)


def check(actual: Result, expected: Result):
  """The same spans have the same embeddings, loss and gradient."""
  assert actual.towers.keys() == expected.towers.keys() and len(actual.towers) >= 4
  for key, vectors in expected.towers.items():
    for actual_D, expected_D in zip(actual.towers[key], vectors, strict=True):
      close(actual_D, expected_D)
  check_loss_and_gradient(actual, expected)


def one_batch(corpus: Corpus, *, length=48, batch_size=3, targets='all', context_items=2, row_length=None) -> Batch:
  """All of a corpus, packed."""
  options = RowOptions(targets=targets, context_items=context_items, row_length=row_length)
  one = OnePass(corpus, batch_size=batch_size, length=length, options=options)
  assert len(one) == 1
  return Batch(one.batch(0), one.layouts[0], one.excerpts)


def apart(corpus: Corpus, cut: Excerpts) -> Batch:
  """Each excerpt in a row of its own, and each text alone in a row."""
  texts = np.unique(target_texts(corpus, cut, np.arange(len(cut))))
  n = max(len(cut), len(texts))
  alone = [np.array([text]) for text in texts] + [np.zeros(0, int)] * (n - len(texts))
  layout = BatchLayout([np.array([e]) for e in range(len(cut))] + [np.zeros(0, int)] * (n - len(cut)), alone)
  longest = int(corpus.item_lengths.max()) + corpus.bos_length
  shapes = Shapes(B=n, L=int(cut.tokens.max()), M=longest,
                  E=int((cut.stops - cut.first_targets).max()), S=1)
  return Batch(build_rows(corpus, cut, layout, shapes), layout, cut)


def packing_corpus(bos: bool) -> Corpus:
  return random_corpus(2, users=9, items=9, longest_item=3, lengths=(2, 6), bos=BOS if bos else None, following=(3, 4))


# Law 1: packed = unpacked.


@pytest.mark.parametrize('targets, bos', [('all', False), ('all', True), ('last', True)])
def test_packed_is_unpacked(targets, bos):
  corpus = packing_corpus(bos)
  packed = one_batch(corpus, targets=targets)
  assert packed.arrays['segments'].max() >= 3 and packed.arrays['alone_segments'].max() >= 2
  check(run(packed, bos=bos), run(apart(corpus, packed.cut), bos=bos))


def test_rows_longer_than_any_history_are_unpacked(monkeypatch):
  monkeypatch.setattr(packed_attention, 'LEAST_QUERIES', 8)
  corpus = packing_corpus(True)
  packed = one_batch(corpus, row_length=150, length=40, batch_size=2)
  longest = 40, int(corpus.item_lengths.max()) + 1
  assert packed.arrays['tokens'].shape == (2, 150) and packed.arrays['positions'].max() < 40
  assert packed.arrays['alone_tokens'].shape[1] > 3 * longest[1]
  check(run(packed, bos=True, longest=longest, patched=True), run(apart(corpus, packed.cut), bos=True))


def test_packed_is_unpacked_where_histories_have_no_negatives_of_their_own():
  packed = one_batch(packing_corpus(False))
  options = dict(objective=dataclasses.replace(EQUAL_WEIGHTS, mask_same_history=True, direction='symmetric'))
  with_own = run(packed)
  without = run(packed, **options)
  check_loss_and_gradient(without, run(apart(packing_corpus(False), packed.cut), **options))
  assert without.terms['tt'] < with_own.terms['tt'] - 1e-3


def _mask_dropped(monkeypatch, batch):
  monkeypatch.setattr(attention, 'causal_mask', lambda s: jnp.triu(jnp.ones((len(s), s.shape[1], s.shape[1]), bool)))
  return batch


def _positions_not_restarted(monkeypatch, batch):
  # Rotary positions are relative, so attention alone would not see it; where the BOS is does.
  return batch.change(positions=np.arange(48)[None] * (batch.arrays['segments'] > 0))


def _local_denominator(monkeypatch, batch):
  whole = TwoTower.target_nll
  def by_row(self, hidden_BLD, batch):
    row = lambda x, number: x[number:number + 1]
    means = [whole(self, row(hidden_BLD, n), {name: row(batch[name], n) for name in ('labels', 'loss_weights')})
             / jnp.sum(batch['loss_weights'][n]) for n in range(len(hidden_BLD))]
    return jnp.mean(jnp.stack(means)) * jnp.sum(batch['loss_weights'])
  monkeypatch.setattr(TwoTower, 'target_nll', by_row)
  return batch


def _slots_of_the_own_row(monkeypatch, batch):
  return batch.change(span_slots=batch.arrays['span_slots'] % batch.arrays['slot_texts'].shape[1])


@pytest.mark.parametrize('mutant', [_mask_dropped, _positions_not_restarted, _local_denominator, _slots_of_the_own_row])
def test_mutants_of_packing_fail(mutant, monkeypatch):
  corpus = packing_corpus(True)
  packed = one_batch(corpus)
  expected = run(apart(corpus, packed.cut), bos=True)
  changed = run(mutant(monkeypatch, packed), bos=True, patched=True)
  with pytest.raises(AssertionError):
    check(changed, expected)


# Law 2: all targets in one pass = prefixes written out one by one.


def prefixes(corpus: Corpus, cut: Excerpts, starts: np.ndarray) -> Excerpts:
  """One excerpt a target, that ends with it, from `starts` of the excerpt that it is of."""
  of = np.repeat(np.arange(len(cut)), cut.stops - cut.first_targets)
  targets = np.concatenate([np.arange(a, b) for a, b in zip(cut.first_targets, cut.stops, strict=True)])
  lengths = corpus.item_lengths[corpus.events]
  tokens = [corpus.opener[1] + lengths[a:b + 1].sum() + (b - a) * corpus.next_prompt[1]
            for a, b in zip(starts[of], targets, strict=True)]
  return Excerpts(cut.users[of], starts[of], targets + 1, targets, np.array(tokens), lengths[targets] + 1,
                  cut.log_shares, {})


def prefix_corpus(bos: bool) -> Corpus:
  return random_corpus(5, users=4, items=8, longest_item=3, lengths=(3, 13), bos=BOS if bos else None, following=(3, 4))


@pytest.mark.parametrize('bos', [False, True])
def test_one_pass_is_prefixes_written_out(bos):
  corpus = prefix_corpus(bos)
  one_pass = one_batch(corpus, batch_size=4, length=36)
  assert len(set(one_pass.cut.users.tolist())) < len(one_pass.cut)  # a history is cut in windows
  written_out = apart(corpus, prefixes(corpus, one_pass.cut, one_pass.cut.starts))
  assert (written_out.arrays['span_texts'] > 0).sum(axis=1).max() == 1
  check(run(one_pass, bos=bos), run(written_out, bos=bos))


def test_prefixes_of_whole_histories_are_not_those_of_windows():
  corpus = prefix_corpus(False)
  one_pass = one_batch(corpus, batch_size=4, length=36)
  whole = apart(corpus, prefixes(corpus, one_pass.cut, corpus.offsets[one_pass.cut.users]))
  with pytest.raises(AssertionError):
    check(run(one_pass), run(whole))


def _next_prompt_for_the_end(monkeypatch, batch):
  a = batch.arrays
  follows = np.roll(a['segments'], -1, axis=1) == a['segments']
  labels = np.where(follows & (a['loss_weights'] > 0), np.roll(a['tokens'], -1, axis=1), a['labels'])
  assert (labels != a['labels']).any()
  return batch.change(labels=labels)


def _user_mean_with_the_target(monkeypatch, batch):
  plain = two_tower.span_positions
  monkeypatch.setattr(two_tower, 'span_positions', lambda *args: (jnp.logical_or(*plain(*args)), plain(*args)[1]))
  return batch


def _user_mean_to_the_last_target(monkeypatch, batch):
  plain = two_tower.span_positions
  def without_later_items(b, bos):
    segment = (b['segments'][:, None, :] == b['span_segments'][:, :, None]) & (b['span_texts'] > 0)[:, :, None]
    target = plain(b, bos)[1]
    return segment & ~target, target
  monkeypatch.setattr(two_tower, 'span_positions', without_later_items)
  return batch


def _end_not_counted(monkeypatch, batch):
  a = batch.arrays
  return batch.change(loss_weights=a['loss_weights'] * (a['labels'] != 1))


@pytest.mark.parametrize('mutant', [_next_prompt_for_the_end, _user_mean_with_the_target, _user_mean_to_the_last_target,
                                    _end_not_counted])
def test_mutants_of_one_pass_fail(mutant, monkeypatch):
  corpus = prefix_corpus(False)
  one_pass = one_batch(corpus, batch_size=4, length=36)
  expected = run(apart(corpus, prefixes(corpus, one_pass.cut, one_pass.cut.starts)))
  changed = run(mutant(monkeypatch, one_pass), patched=True)
  with pytest.raises(AssertionError):
    check(changed, expected)


# What the method says, by hand.


@jax.jit
def _forward(tokens_BL):
  def both(decoder):
    hidden = decoder(tokens_BL, jnp.ones_like(tokens_BL), jnp.arange(tokens_BL.shape[1])[None])
    return hidden, jax.nn.log_softmax(decoder.logits(hidden))
  return Decoder(CONFIG).apply({'params': params()['decoder']}, method=both)


def _plain(tokens_L, bos):
  """Hidden states [L, D] and log-probabilities [L, V] of one text, without its BOS."""
  row = [BOS] * int(bos) + [int(token) for token in tokens_L]
  hidden, logp = _forward(np.array([row + [0] * (40 - len(row))], np.int32))  # nothing sees what comes after it
  return hidden[0, int(bos):len(row)], logp[0, int(bos):len(row)]


@pytest.mark.parametrize('bos', [False, True])
def test_a_span_by_hand(bos):
  corpus = random_corpus(7, users=4, items=6, longest_item=3, lengths=(3, 6), bos=BOS if bos else None,
                         following=(3, 4))
  batch = one_batch(corpus, batch_size=2, targets='last')
  result, nll, event_items = run(batch, bos=bos), [], corpus.events
  item = lambda event: corpus.bank[corpus.item_starts[event_items[event]]:][:corpus.item_lengths[event_items[event]]]
  assert len(result.towers) == 4
  for user, number in result.towers:
    low, last = corpus.offsets[user], corpus.offsets[user] + number - 1
    history = [part for event in range(low, last) for part in ([2] if event == low else [3, 4], item(event))] + [[3, 4]]
    start, target = sum(map(len, history)), item(last)
    hidden, logp = _plain(np.concatenate([*history, target]), bos)
    np.testing.assert_allclose(result.towers[user, number], np.stack([
        hidden[:start].mean(0), hidden[start:].mean(0), _plain(target, bos)[0].mean(0)]), atol=1e-5)
    nll += [-logp[start - 1 + i, token] for i, token in enumerate([*target, corpus.eos])]
  np.testing.assert_allclose(result.terms['nig'], np.mean(nll), rtol=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_terms():
  batch = one_batch(packing_corpus(False))
  for objective in (Objective(), Objective(alpha=0.4, beta=0.6)):
    terms = run(batch, objective=objective).terms
    a, b = objective.alpha, objective.beta
    expected = (1 - a - b) * terms['nig'] + a * terms['tt'] + b * terms['ut']
    np.testing.assert_allclose(terms['loss'], expected, rtol=1e-6)
    assert terms['target_tokens'] == batch.cut.losses.sum() and terms['spans'] == len(batch.span_keys())
    assert terms['tokens'] == batch.cut.tokens.sum() + (batch.arrays['alone_segments'] > 0).sum()


def test_without_contrast_the_texts_alone_are_not_read():
  batch, objective = one_batch(packing_corpus(False)), Objective(alpha=0, beta=0)
  scrambled = batch.change(alone_tokens=batch.arrays['alone_tokens'][::-1].copy())
  plain, other = run(batch, objective=objective), run(scrambled, objective=objective)
  assert plain.terms['loss'] == other.terms['loss'] == plain.terms['nig']
  jax.tree.map(np.testing.assert_array_equal, plain.grads, other.grads)


def check_sum_of_passes(batch: Batch, pooled=two_tower.pooled):
  """The gradient of both passes is the sum of the gradients of each, and neither is nothing."""
  model, whole = TwoTower(Decoder(CONFIG), EQUAL_WEIGHTS), run(batch).grads
  a = batch.arrays

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def apart_grads(joint_params, alone_params):
    pass_of = lambda module, prefix: module.decoder(*(a[prefix + name] for name in ('tokens', 'segments', 'positions')))
    hidden, nig = model.apply({'params': joint_params}, method=lambda m: (
        pass_of(m, ''), two_tower.mean_nll(m.target_nll(pass_of(m, ''), a), a)))
    alone = model.apply({'params': alone_params}, method=lambda m: pass_of(m, 'alone_'))
    terms = two_tower.contrast(two_tower.towers(pooled(hidden, alone, a, bos=False), a), a, EQUAL_WEIGHTS)
    return EQUAL_WEIGHTS.total(nig, terms['tt'], terms['ut'])

  joint, alone = apart_grads(params(), params())
  jax.tree.map(lambda total, one, other: close(one + other, total), whole, joint, alone)
  assert all(min(np.abs(x).max() for x in jax.tree.leaves(grads)) > 0 for grads in (joint, alone))


def test_the_gradient_is_the_sum_of_both_passes():
  batch = one_batch(packing_corpus(False))
  check_sum_of_passes(batch)
  stopped = lambda hidden, alone, batch, bos: two_tower.pooled(hidden, jax.lax.stop_gradient(alone), batch, bos=bos)
  with pytest.raises(AssertionError):
    check_sum_of_passes(batch, pooled=stopped)


# What may not move anything.


def padded(batch: Batch, corpus: Corpus, seed=0) -> Batch:
  """The same rows in larger shapes, with rubbish for tokens and labels where nothing is."""
  a, rng = batch.arrays, np.random.default_rng(seed)
  B, L, S = *a['tokens'].shape, a['slot_texts'].shape[1]
  shapes = Shapes(B=B + 2, L=L + 8, M=a['alone_tokens'].shape[1] + 8,
                  E=a['span_texts'].shape[1] + 2, S=S + 1)
  empty_rows = [np.zeros(0, int)] * 2
  layout = BatchLayout(batch.layout.rows + empty_rows, batch.layout.alone_rows + empty_rows)
  arrays = build_rows(corpus, batch.cut, layout, shapes)
  for name, segments in (('tokens', 'segments'), ('labels', 'segments'), ('alone_tokens', 'alone_segments')):
    rubbish = rng.integers(0, CONFIG.vocab_size, arrays[name].shape)
    arrays[name] = np.where(arrays[segments] > 0, arrays[name], rubbish).astype(np.int32)
  return Batch(arrays, layout, batch.cut)


def test_padding_moves_neither_loss_nor_gradient():
  corpus = packing_corpus(False)
  batch = one_batch(corpus)
  plain, larger = run(batch), run(padded(batch, corpus))
  check(larger, plain)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(larger.grads))


def test_padding_that_counts_fails():
  corpus = packing_corpus(False)
  batch = one_batch(corpus)
  larger = padded(batch, corpus)
  weights = np.ones_like(larger.arrays['loss_weights'])
  with pytest.raises(AssertionError):
    check(run(larger.change(loss_weights=weights)), run(batch))


def test_blocks_of_the_head_move_nothing():
  batch = one_batch(packing_corpus(False))
  assert batch.arrays['loss_weights'].sum() % 7  # a block is filled up
  check(run(batch, head_block=7), run(batch))


def check_causal(batch: Batch):
  """The loss of each token, with and without other tokens after it."""
  a = batch.arrays
  def nll(tokens):
    def both(decoder):
      logits = decoder.logits(decoder(tokens, a['segments'], a['positions']))
      return optax.softmax_cross_entropy_with_integer_labels(logits, a['labels'])
    return Decoder(CONFIG).apply({'params': params()['decoder']}, method=both)
  nll, others = jax.jit(nll), np.random.default_rng(0).integers(0, CONFIG.vocab_size, a['tokens'].shape)
  plain = nll(a['tokens'])
  for position in (0, 5, 17):
    changed = nll(np.where(np.arange(a['tokens'].shape[1]) > position, others, a['tokens']))
    np.testing.assert_array_equal(changed[:, :position + 1], plain[:, :position + 1])
    assert np.abs(changed - plain)[:, position + 1:].max() > 1e-2


def test_no_token_depends_on_later_ones(monkeypatch):
  batch = one_batch(packing_corpus(False))
  check_causal(batch)
  monkeypatch.setattr(attention, 'causal_mask', lambda s: s[:, :, None] == s[:, None, :])
  with pytest.raises(AssertionError):
    check_causal(batch)


def test_excerpts_of_one_batch_are_those_of_the_corpus():
  corpus = prefix_corpus(False)
  cut = excerpts(corpus, length=36, targets='all', context_items=2)
  assert sorted(one_batch(corpus, batch_size=4, length=36).span_keys()) == sorted(
      (int(user), int(event - corpus.offsets[user] + 1)) for user, first, stop in zip(
          cut.users, cut.first_targets, cut.stops, strict=True) for event in range(first, stop))
