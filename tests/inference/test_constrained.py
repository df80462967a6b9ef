"""Law 7: a beam as wide as the catalogue ranks it by exact likelihood; and filters and samples keep to the trie."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.inference import constrained
from calrec_jax.inference.constrained import beam_search, on_device, sample_items, stay_in_place
from calrec_jax.inference.trie import Trie, build_trie
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.text.item_tokens import ItemTokens

V, EOS, LONGEST = 14, 1, 5
WIDTH, K = 8, 10  # of narrow beams; few numbers, as each is a program
DECODER = Decoder(DecoderConfig(vocab_size=V, n_layers=2, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=4, ff_dim=16,
                                dtype='float32'))
# Three users of different lengths. The padding is made of ordinary tokens: nothing may infer it from an id.
LENGTHS_U = np.array([3, 7, 5], np.int32)
TOKENS_UP = np.random.default_rng(0).integers(2, V, (3, 8)).astype(np.int32)
KEYS_U = np.arange(6, dtype=np.uint32).reshape(3, 2)

# Optimized, as a user's program is: it rounds less than the quick ones of `conftest.py`.
optimized = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})


@functools.cache
def parameters():
  """Wide weights: attention is far from uniform, and texts differ."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = nn.meta.unbox(jax.jit(DECODER.init)(jax.random.key(3), tokens, tokens + 1, tokens))['params']
  return decoding.by_layer(jax.tree.map(lambda x: 3 * x, params))


@jax.jit
def prefill(params, tokens_UP, lengths_U):
  return decoding.prefill(DECODER, params, tokens_UP, lengths_U, bos=False)


@functools.cache
def prefix(users=(0, 1, 2)):
  return prefill(parameters(), TOKENS_UP[list(users)], LENGTHS_U[list(users)])


def build(items) -> Trie:
  offsets = np.cumsum([0, *map(len, items)], dtype=np.int64)
  return build_trie(ItemTokens(np.concatenate(items).astype(np.int32), offsets), max_item_tokens=LONGEST, eos_id=EOS)


@functools.cache
def catalogue_items() -> list[np.ndarray]:
  """500 items; all begin with one token, some are others' beginnings, some are others' twins."""
  rng = np.random.default_rng(5)
  items = [np.append(2, rng.integers(2, V, rng.integers(2, LONGEST))) for _ in range(400)]
  items += [items[i][:rng.integers(1, LONGEST + 1)] for i in range(50)] + items[50:100]
  return items


@functools.cache
def catalogue() -> Trie:
  return build(catalogue_items())


@functools.cache
def small() -> Trie:
  return build([np.asarray(item) for item in ([2], [2, 3], [2, 3, 4], [2, 3, 5], [2, 6, 3], [4, 4], [4, 5, 6], [7, 7, 7, 7])])


@functools.partial(optimized, static_argnums=0)
def plain(decoder, params, tokens_RL):
  positions_RL = jnp.broadcast_to(jnp.arange(tokens_RL.shape[1])[None], tokens_RL.shape)
  stacked = {**params, 'layers': jax.tree.map(lambda *layers: jnp.stack(layers), *params['layers'])}
  states = decoder.apply({'params': stacked}, tokens_RL, jnp.ones_like(tokens_RL), positions_RL)
  return decoder.apply({'params': stacked}, states, method='logits')


@functools.cache
def token_logits(trie_of, user: int) -> tuple[np.ndarray, np.ndarray]:
  """In full passes: logits of each text's tokens and end, float64 [T, LONGEST + 1, V], and which these are [T, LONGEST + 1]."""
  trie, length = trie_of(), LENGTHS_U[user]
  tokens_TS = trie.text_tokens(np.arange(trie.n_texts))
  rows_TL = np.zeros((trie.n_texts, 8 + LONGEST), np.int32)
  rows_TL[:, :length] = TOKENS_UP[user, :length]
  rows_TL[:, length:length + tokens_TS.shape[1]] = tokens_TS
  logits = np.asarray(plain(DECODER, parameters(), rows_TL), np.float64)[:, length - 1:length + LONGEST]
  labels = np.pad(tokens_TS, ((0, 0), (0, LONGEST + 1 - tokens_TS.shape[1])), constant_values=EOS)
  return logits, labels


@functools.cache
def exact(trie_of, user: int) -> np.ndarray:
  """float64 [T]: log P(text and its end | prefix)."""
  logits, labels = token_logits(trie_of, user)
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  of_labels = np.take_along_axis(logprobs, labels[..., None], axis=2)[..., 0]
  return np.where(np.arange(LONGEST + 1)[None] <= trie_of().lengths_T[:, None], of_labels, 0).sum(1)


def search(trie, users=(0, 1, 2), **options):
  options = {'width': WIDTH, 'k': K, 'eos_id': EOS} | options
  return beam_search(DECODER, parameters(), prefix(users), on_device(trie), **options)


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


def check_law_7():
  trie = catalogue()
  found = search(trie, width=trie.n_texts, k=trie.n_texts)
  for user in range(3):
    expected_T = exact(catalogue, user)
    assert sorted(found.texts_UK[user]) == list(range(trie.n_texts))
    close(found.logprobs_UK[user], expected_T[found.texts_UK[user]])
    in_order = expected_T[found.texts_UK[user]]
    assert (np.diff(in_order) < 1e-4).all()  # up to gaps under 1e-4


def test_a_beam_as_wide_as_the_catalogue_ranks_it_by_exact_likelihood():
  trie, items = catalogue(), catalogue_items()
  assert len(items) == 500 and 300 < trie.n_texts < 450  # some are twins
  texts = [row[:length] for row, length in zip(trie.text_tokens(np.arange(trie.n_texts)).tolist(), trie.lengths_T, strict=True)]
  assert sum(one == other[:len(one)] for one, other in zip(texts, texts[1:], strict=False)) > 20  # beginnings of others
  check_law_7()


def mutant_children(change):
  original = constrained._children

  def children(nodes, fanout, logits_BV, norm_B, counts_UT, rows):
    return change(*original(nodes, fanout, logits_BV, norm_B, counts_UT, rows))
  return children


MUTANTS = {
    'the softmax is over the children': lambda children, tokens, logprobs: (
        children, tokens, logprobs - jnp.nan_to_num(jax.nn.logsumexp(logprobs, axis=1, keepdims=True))),
    'the end does not count': lambda children, tokens, logprobs: (
        children, tokens, jnp.where((tokens == EOS) & (logprobs > -jnp.inf), 0, logprobs)),
    'the label is the one before': lambda children, tokens, logprobs: (
        children, jnp.where(tokens > 2, tokens - 1, tokens), logprobs),
}


@pytest.mark.parametrize('mutant', MUTANTS)
def test_law_7_fails_when(monkeypatch, mutant):
  monkeypatch.setattr(constrained, '_children', mutant_children(MUTANTS[mutant]))
  original = constrained._grow.__wrapped__
  monkeypatch.setattr(constrained, '_grow', jax.jit(lambda *args: original(*args), static_argnums=(0, 1, 2)))
  with pytest.raises(AssertionError):
    check_law_7()


def test_law_7_fails_when_suffixes_do_not_follow_their_beams(monkeypatch):
  advance = constrained.advance

  def stay(decoder, params, prefix, suffix, parents_B, *rest):
    parents_B = None if parents_B is None else np.minimum(np.arange(len(parents_B)), parents_B.max())
    return advance(decoder, params, prefix, suffix, parents_B, *rest)
  monkeypatch.setattr(constrained, 'advance', stay)
  with pytest.raises(AssertionError):
    check_law_7()


def test_a_narrow_beam_finds_texts_with_their_exact_scores():
  trie = catalogue()
  found = search(trie)
  assert found.texts_UK.shape == (3, K) and found.texts_UK.dtype == np.int32 and found.logprobs_UK.dtype == np.float32
  for user in range(3):
    texts = found.texts_UK[user]
    assert (texts >= 0).all() and len(set(texts.tolist())) == K
    close(found.logprobs_UK[user], exact(catalogue, user)[texts])
    assert (np.diff(found.logprobs_UK[user]) <= 0).all()


def test_a_beam_ends_that_cannot_lead_to_a_better_text(monkeypatch):
  """The search for the best few ends earlier, and loses none of what the search for all finds."""
  trie = catalogue()
  numbers, advance = [], constrained.advance
  monkeypatch.setattr(constrained, 'advance', lambda *args: numbers.append(len(args[6])) or advance(*args))
  every = search(trie, width=trie.n_texts, k=trie.n_texts)
  all_numbers = numbers.copy()
  numbers.clear()
  few = search(trie, width=trie.n_texts, k=2)
  np.testing.assert_array_equal(few.texts_UK, every.texts_UK[:, :2])
  close(few.logprobs_UK, every.logprobs_UK[:, :2])
  assert sum(numbers) < sum(all_numbers) / 4
  # All items have one first token: a user has one branch there, and never more than there are nodes with children.
  assert all_numbers[0] == 3 and len(all_numbers) == LONGEST


def test_a_user_finds_the_same_in_any_batch():
  trie = catalogue()
  together = search(trie)
  for users in ((2, 0, 1), (1, 1, 2)):
    others = search(trie, users)
    np.testing.assert_array_equal(others.texts_UK, together.texts_UK[list(users)])
    close(others.logprobs_UK, together.logprobs_UK[list(users)])


# Filters.


def same_texts(found, trie, other, other_trie):
  """Both results are the same texts, by their tokens."""
  for one_K, other_K in zip(found.texts_UK, other.texts_UK, strict=True):
    assert (one_K >= 0).sum() == (other_K >= 0).sum()
    for one, another in zip(one_K[one_K >= 0], other_K[other_K >= 0], strict=True):
      assert trie.text_tokens(one)[:trie.lengths_T[one]].tolist() == other_trie.text_tokens(another).tolist()
  close(found.logprobs_UK, other.logprobs_UK)


def test_a_filtered_search_is_that_of_a_trie_of_the_allowed_items():
  trie, items = catalogue(), catalogue_items()
  allowed_I = np.random.default_rng(7).random(len(items)) < 0.05
  allowed_T = np.zeros(trie.n_texts, bool)
  allowed_T[trie.texts_I[allowed_I]] = True
  of_allowed = build([item for item, allowed in zip(items, allowed_I, strict=True) if allowed])
  filtered = search(trie, allowed_UT=allowed_T)
  same_texts(filtered, trie, search(of_allowed), of_allowed)
  with pytest.raises(AssertionError):  # mutant: the filter acts after the search
    found = search(trie)
    assert allowed_T[found.texts_UK].sum() == (filtered.texts_UK >= 0).sum()


def test_three_that_are_allowed_are_found_whatever_their_rank():
  trie = catalogue()
  allowed_UT = np.zeros((3, trie.n_texts), bool)
  worst_U3 = np.stack([np.argsort(exact(catalogue, user))[:3] for user in range(3)])  # each user has others
  np.put_along_axis(allowed_UT, worst_U3, True, axis=1)
  found = search(trie, allowed_UT=allowed_UT)
  assert (found.texts_UK[:, 3:] == -1).all() and (found.logprobs_UK[:, 3:] == -np.inf).all()
  np.testing.assert_array_equal(found.texts_UK[:, :3], worst_U3[:, ::-1])


def test_where_nothing_is_allowed_nothing_is_found():
  trie = catalogue()
  allowed_UT = np.ones((3, trie.n_texts), bool)
  allowed_UT[1] = False
  found = search(trie, allowed_UT=allowed_UT)
  assert (found.texts_UK[1] == -1).all() and (found.texts_UK[[0, 2]] >= 0).all()
  sampled = draw(trie, allowed_UT=allowed_UT)
  assert (sampled.texts_UK[1] == -1).all() and (sampled.logprobs_UK[1] == -np.inf).all()
  assert (sampled.texts_UK[[0, 2]] >= 0).all() and np.isfinite(sampled.logprobs_UK[[0, 2]]).all()


# Samples.


def draw(trie, users=(0, 1, 2), **options):
  options = {'n_samples': 8, 'temperature': 1.0, 'eos_id': EOS} | options
  return sample_items(DECODER, parameters(), prefix(users), on_device(trie), KEYS_U[list(users)], **options)


def constrained_distribution(user: int, temperature: float, allowed_T: np.ndarray) -> np.ndarray:
  """float64 [T], by the definition: at each place, the softmax over the tokens that lead to an allowed text."""
  logits, labels = token_logits(small, user)
  texts = [tuple(labels_S[:length + 1]) for labels_S, length in zip(labels, small().lengths_T, strict=True)]
  found = np.zeros(len(texts))
  for number, text in enumerate(texts):
    if allowed_T[number]:
      found[number] = 1
      for place, token in enumerate(text):
        children = {other[place] for other, allowed in zip(texts, allowed_T, strict=True)
                    if allowed and other[:place] == text[:place]}
        weights = {child: np.exp(logits[number, place, child] / temperature) for child in children}
        found[number] *= weights[token] / sum(weights.values())
  return found


def chi_square(counts, probabilities):
  expected = counts.sum() * probabilities
  return ((counts - expected)**2 / expected).sum()


@pytest.mark.parametrize('temperature, left_out', [(1.0, []), (4.0, [1, 4])])
def test_frequencies_are_those_of_the_constrained_distribution(temperature, left_out):
  trie = small()
  allowed_T = ~np.isin(np.arange(trie.n_texts), left_out)
  samples = draw(trie, (1,), n_samples=4000, temperature=temperature, allowed_UT=allowed_T)
  counts = np.bincount(samples.texts_UK[0], minlength=trie.n_texts)
  assert counts.sum() == 4000 and not counts[~allowed_T].any()
  expected = constrained_distribution(1, temperature, allowed_T)
  np.testing.assert_allclose(expected.sum(), 1)
  enough = expected * 4000 > 5
  assert enough.sum() >= 4 and counts[~enough].sum() < 40
  assert chi_square(counts[enough], expected[enough] / expected[enough].sum()) < 29.9  # 7 degrees of freedom: 1 in 10,000
  other = constrained_distribution(1, 2.0, allowed_T)  # mutant: another temperature
  assert chi_square(counts[enough], other[enough] / other[enough].sum()) > 100
  close(samples.logprobs_UK[0], exact(small, 1)[samples.texts_UK[0]])  # at temperature 1, over the whole vocabulary


def test_every_sample_is_a_text_with_its_exact_log_probability():
  trie = catalogue()
  samples = draw(trie, temperature=8.0)
  assert samples.texts_UK.shape == (3, 8) and (samples.texts_UK >= 0).all() and (samples.texts_UK < trie.n_texts).all()
  for user in range(3):
    assert len(set(samples.texts_UK[user].tolist())) > 4
    close(samples.logprobs_UK[user], exact(catalogue, user)[samples.texts_UK[user]])


def test_a_user_gets_the_same_texts_in_any_batch_order_and_number_of_samples():
  trie = catalogue()
  together = draw(trie).texts_UK
  for users in ((2, 0, 1), (1, 1, 2), (1,)):
    np.testing.assert_array_equal(draw(trie, users).texts_UK, together[list(users)])
  np.testing.assert_array_equal(draw(trie, n_samples=11).texts_UK[:, :8], together)
  with pytest.raises(AssertionError):  # mutant: the key is the row's
    moved = sample_items(DECODER, parameters(), prefix((2, 0, 1)), on_device(trie), KEYS_U, n_samples=8, temperature=1.0,
                         eos_id=EOS)
    np.testing.assert_array_equal(moved.texts_UK, together[[2, 0, 1]])


def test_temperature_0_takes_the_best_child_at_each_step():
  trie = small()
  samples = draw(trie, temperature=0.0, n_samples=2)
  texts = [(*trie.text_tokens(number)[:length].tolist(), EOS) for number, length in enumerate(trie.lengths_T)]
  for user in range(3):
    logits, _ = token_logits(small, user)
    text: tuple = ()
    while text not in texts:
      matching = [number for number, other in enumerate(texts) if other[:len(text)] == text]
      text += (max({texts[number][len(text)] for number in matching}, key=lambda token: logits[matching[0], len(text), token]),)
    assert samples.texts_UK[user].tolist() == [texts.index(text)] * 2


# Places, programs, bad input.


def test_one_child_of_each_parent_stays_in_its_place():
  for seed in range(20):
    rng = np.random.default_rng(seed)
    parents_B = rng.integers(0, 12, rng.integers(1, 12))
    order_B = stay_in_place(parents_B)
    assert sorted(order_B) == list(range(len(parents_B)))
    placed_B = parents_B[order_B]
    here = np.arange(len(placed_B))
    assert all(placed_B[parent] == parent for parent in placed_B if parent < len(placed_B))
    assert not np.isin(placed_B[placed_B != here], here[placed_B != here]).any()  # nothing is read that is written


def test_a_catalogue_of_about_the_same_size_finds_its_programs():
  trie, items = catalogue(), catalogue_items()
  search(trie)
  before = constrained._grow._cache_size()
  search(build(items[:480]))
  assert constrained._grow._cache_size() == before


@pytest.mark.parametrize('options, match', [
    ({'width': 0}, 'width = 0'), ({'k': 0}, 'k = 0'), ({'eos_id': 2}, 'with token 1'),
    ({'allowed_UT': np.ones(7, bool)}, r'bool\[7\]'), ({'allowed_UT': np.ones((2, 8), bool)}, r'bool\[2, 8\]'),
    ({'allowed_UT': np.ones(8)}, r'float64\[8\]')])
def test_bad_input_is_named(options, match):
  with pytest.raises(ValueError, match=match):
    search(small(), **options)
