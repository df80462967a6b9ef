"""Law 6: sampling with a shared prefix is plain forward passes; and the noise is what it is said to be."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.inference import sampling
from calrec_jax.inference.noise import gumbel, sample_keys
from calrec_jax.inference.sampling import choose, level, nucleus_bound, sample
from calrec_jax.models import decoding
from calrec_jax.models.attention import Step
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig

V, EOS, T = 11, 1, 6
DECODER = Decoder(DecoderConfig(vocab_size=V, n_layers=2, embed_dim=16, n_heads=4, n_kv_heads=2, head_dim=4, ff_dim=16,
                                dtype='float32'))
# Three users of different lengths. The padding is made of ordinary tokens: nothing may infer it from an id.
LENGTHS_U = np.array([3, 7, 5], np.int32)
TOKENS_UP = np.random.default_rng(0).integers(2, V, (3, 8)).astype(np.int32)
KEYS_U = np.arange(6, dtype=np.uint32).reshape(3, 2)


@functools.cache
def parameters():
  """Wide weights: attention is far from uniform, and samples differ."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = nn.meta.unbox(jax.jit(DECODER.init)(jax.random.key(3), tokens, tokens + 1, tokens))['params']
  return jax.tree.map(lambda x: 3 * x, params)


@functools.partial(jax.jit, static_argnums=0)
def prefill(decoder, params, tokens_UP, lengths_U):
  return decoding.prefill(decoder, params, tokens_UP, lengths_U, bos=False)


def draw(tokens_UP=TOKENS_UP, lengths_U=LENGTHS_U, keys_U=KEYS_U, decoder=DECODER, params=None, **kwargs):
  options = {'n_samples': 4, 'temperature': 1.0, 'max_new_tokens': T, 'eos_id': EOS} | kwargs
  params = decoding.by_layer(parameters() if params is None else params)
  return sample(decoder, params, prefill(decoder, params, tokens_UP, lengths_U), keys_U, **options)


@jax.jit
def forward(params, tokens_BL):
  positions_BL = jnp.arange(tokens_BL.shape[1])[None]
  hidden_BLD = DECODER.apply({'params': params}, tokens_BL, jnp.ones_like(tokens_BL), positions_BL)
  return DECODER.apply({'params': params}, hidden_BLD, method='logits')


@functools.cache
def plain_logits(tokens: tuple[int, ...]) -> np.ndarray:
  """float64 [L, V] of one sequence, on its own. Zeros after it, which it cannot see, save compiling for each length."""
  padded = np.pad(np.asarray(tokens), (0, 8 + T - len(tokens)))
  return np.asarray(forward(parameters(), jnp.asarray(padded)[None])[0, :len(tokens)], np.float64)


def texts(samples):
  """(user, sample, its tokens without the end, its plain logits [tokens + 1, V] from the last prefix position on)."""
  for user, prefix_length in enumerate(LENGTHS_U):
    for n, length in enumerate(samples.lengths_UN[user]):
      tokens = samples.tokens_UNT[user, n, :length].tolist()
      # Law 6 is about the sampler's own steps, so the last token of an unfinished text need not be read.
      yield user, n, tokens, plain_logits((*TOKENS_UP[user, :prefix_length].tolist(), *tokens))[prefix_length - 1:]


def close(actual, expected, rtol=1e-5):
  expected = np.asarray(expected, np.float64)
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=rtol * np.abs(expected).max())


def watched(monkeypatch, step=None, lengths_U=LENGTHS_U, **kwargs):
  """(the logits [U, N, V] of every step that was taken, the samples); `step` is a mutant in the place of `Step`."""
  seen = []

  def recorded(decoder, params, keys_U, allowed_V, N, temperature, top_p, hidden_BD, branch_UN, place):
    seen.append(np.asarray(decoding.logits(decoder, params, hidden_BD))[branch_UN])
    return _draw(decoder, params, keys_U, allowed_V, N, temperature, top_p, hidden_BD, branch_UN, place)
  _draw = sampling._draw
  with monkeypatch.context() as patch:
    patch.setattr(sampling, '_draw', recorded)
    if step:
      patch.setattr(decoding, 'Step', step)
      original = sampling.read_tokens.__wrapped__
      patch.setattr(sampling, 'read_tokens', jax.jit(lambda *args: original(*args), static_argnums=0))  # not from the cache
    samples = draw(lengths_U=lengths_U, **kwargs)
  return np.stack(seen), samples


def check_steps(monkeypatch, lengths_U=LENGTHS_U, step=None, **kwargs):
  """Holds the logits of each step against plain forward passes. Mutants: `lengths_U`, `step`."""
  logits_TUNV, samples = watched(monkeypatch, step, lengths_U, **{'n_samples': 2} | kwargs)
  for user, n, tokens, expected in texts(samples):
    n_steps = len(tokens) + bool(samples.finished_UN[user, n])
    close(logits_TUNV[:n_steps, user, n], expected[:n_steps])
  return logits_TUNV, samples


def test_the_logits_of_every_step_are_those_of_a_plain_forward_pass(monkeypatch):
  logits_TUNV, samples = check_steps(monkeypatch)
  assert len(logits_TUNV) == T and samples.lengths_UN.min() >= 2  # there was something to compare
  assert len({tuple(text) for text in samples.tokens_UNT[0].tolist()}) == 2


def test_equal_samples_are_one_branch_until_they_part(monkeypatch):
  numbers, advance = [], sampling.advance

  def counted(*args):
    numbers.append(len(args[6]))
    return advance(*args)
  monkeypatch.setattr(sampling, 'advance', counted)
  logits_TUNV, samples = check_steps(monkeypatch, n_samples=16, temperature=0.5)
  for place, number in enumerate(numbers):
    texts_so_far = {(user, *tokens_T[:place + 1]) for user in range(3) for n, tokens_T in enumerate(samples.tokens_UNT[user])
                    if samples.lengths_UN[user, n] > place}
    assert number == len(texts_so_far)
  assert numbers[0] < numbers[-1] < 3 * 16  # they did part, and some were the same to the end


MUTANTS = {
    'positions continue from the padded length':
        lambda positions, mask, index, *of: Step(jnp.full_like(positions, mask.shape[1]) + index, mask, index, *of),
    'positions start anew': lambda positions, mask, index, *of: Step(jnp.full_like(positions, index), mask, index, *of),
    'positions are one late': lambda positions, mask, index, *of: Step(positions + 1, mask, index, *of),
    'padding is seen': lambda positions, mask, index, *of: Step(positions, jnp.ones_like(mask), index, *of),
    'the last prefix token is not seen':
        lambda positions, mask, index, *of: Step(positions, mask & jnp.roll(mask, -1, axis=1), index, *of),
    'the suffix is one late': lambda positions, mask, index, *of: Step(positions, mask, index + 1, *of),
    "another user's prefix is seen":
        lambda positions, mask, index, members, places: Step(positions, mask, index, members[::-1], places),
}


@pytest.mark.parametrize('mutant', MUTANTS)
def test_the_comparison_fails_when(monkeypatch, mutant):
  with pytest.raises(AssertionError):
    check_steps(monkeypatch, step=MUTANTS[mutant])


@pytest.mark.parametrize('lost', ['no parents', 'the first branch'])
@pytest.mark.parametrize('levels', [1, 4])  # with one, suffixes are moved only; with more they are taken too
def test_the_comparison_fails_when_suffixes_come_from(monkeypatch, lost, levels):
  monkeypatch.setattr(sampling, 'LEVELS', levels)
  take, move = sampling._take, sampling._move
  wrong = (lambda x_B: np.arange(len(x_B)) if lost == 'no parents' else np.zeros_like(x_B))
  monkeypatch.setattr(sampling, '_take', lambda suffix, parents_B: take(suffix, wrong(parents_B) % len(suffix[0].keys)))
  monkeypatch.setattr(sampling, '_move', lambda suffix, parents_M, places_M: (
      suffix if lost == 'no parents' else move(suffix, wrong(parents_M), places_M)))
  with pytest.raises(AssertionError):
    check_steps(monkeypatch, n_samples=8)


def test_the_comparison_fails_when_lengths_are_those_of_the_padded_prefixes(monkeypatch):
  with pytest.raises(AssertionError):
    check_steps(monkeypatch, lengths_U=np.full(3, 8, np.int32))


@pytest.mark.parametrize('temperature, n_samples', [(0.0, 3), (0.5, 3), (2.5, 16)])
def test_logprobs_are_those_of_a_plain_forward_pass_at_temperature_1_with_the_end(temperature, n_samples):
  samples = draw(temperature=temperature, n_samples=n_samples)
  without_end = []
  for user, n, tokens, logits in texts(samples):
    ended = bool(samples.finished_UN[user, n])
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = tokens + [EOS] * ended
    expected = logprobs[np.arange(len(ids)), ids].sum()
    np.testing.assert_allclose(samples.logprobs_UN[user, n], expected, rtol=1e-5)
    without_end.append(expected - logprobs[len(tokens), EOS] * ended)
  assert not np.allclose(samples.logprobs_UN.reshape(-1), without_end, rtol=1e-3) or not samples.finished_UN.any()
  if temperature == 2.5:
    assert 0 < samples.finished_UN.mean() < 1  # both kinds were there to compare


def test_greedy_takes_the_argmax_of_the_full_forward_at_each_step():
  samples = draw(temperature=0.0, n_samples=3)
  for user, n, tokens, logits in texts(samples):
    ids = tokens + [EOS] * bool(samples.finished_UN[user, n])
    assert ids == logits[:len(ids)].argmax(-1).tolist()
  assert (samples.tokens_UNT == samples.tokens_UNT[:, :1]).all()
  with pytest.raises(AssertionError):  # mutant: noise
    noisy = draw(temperature=0.5, n_samples=3)
    for _, _, tokens, logits in texts(noisy):
      assert tokens == logits[:len(tokens)].argmax(-1).tolist()


def test_a_finished_text_is_closed_and_an_unfinished_one_fills_its_places():
  samples = draw(n_samples=16, temperature=2.5)
  assert len(np.unique(samples.lengths_UN)) > 2
  place_T = np.arange(T)
  ended = samples.tokens_UNT == EOS
  np.testing.assert_array_equal(ended, place_T[None, None] >= samples.lengths_UN[..., None])
  np.testing.assert_array_equal(samples.finished_UN, samples.lengths_UN < T)
  assert samples.tokens_UNT.dtype == samples.lengths_UN.dtype == np.int32 and samples.logprobs_UN.dtype == np.float32


# The noise.


def same(a, b):
  np.testing.assert_array_equal(a.tokens_UNT, b.tokens_UNT)
  np.testing.assert_array_equal(a.finished_UN, b.finished_UN)
  np.testing.assert_allclose(a.logprobs_UN, b.logprobs_UN, rtol=1e-5)


def take(samples, users, n=slice(None)):
  return sampling.Samples(*(x[users][:, n] for x in dataclasses.astuple(samples)))


def test_a_user_gets_the_same_texts_in_any_batch_order_bucket_and_number_of_samples():
  all_users = draw()
  order = np.array([2, 0, 1])
  same(draw(TOKENS_UP[order], LENGTHS_U[order], KEYS_U[order]), take(all_users, order))
  same(draw(TOKENS_UP[:1], LENGTHS_U[:1], KEYS_U[:1]), take(all_users, [0]))
  wider = np.concatenate([TOKENS_UP, np.full((3, 4), 5, np.int32)], axis=1)
  same(draw(wider), all_users)
  same(take(draw(n_samples=7), slice(None), slice(4)), all_users)
  with pytest.raises(AssertionError):  # mutant: the key is the row's
    same(draw(TOKENS_UP[order], LENGTHS_U[order], KEYS_U), take(all_users, order))


def parted(a, b):
  """(user, sample, place) where texts begin to differ."""
  differ_UN = (a.tokens_UNT != b.tokens_UNT).any(-1)
  return [(user, n, int(np.argmax(a.tokens_UNT[user, n] != b.tokens_UNT[user, n]))) for user, n in np.argwhere(differ_UN)]


def gap(tokens_UP, lengths_U, keys_U, samples, user, n, place):
  """How far the best two tokens' perturbed scores lie apart, by a plain forward pass."""
  read = (*tokens_UP[user, :lengths_U[user]].tolist(), *samples.tokens_UNT[user, n, :place].tolist())
  key_1 = sample_keys(keys_U[user][None], n + 1).reshape(-1)[n:]
  scores_V = plain_logits(read)[-1] + np.asarray(gumbel(key_1, jnp.int32(place), jnp.arange(V)[None])[0])
  return np.diff(np.sort(scores_V)[-2:])[0]


def test_200_users_get_the_same_texts_in_any_batch_but_where_two_tokens_are_as_good_as_tied():
  rng = np.random.default_rng(5)
  lengths_U, tokens_UP = rng.integers(1, 9, 200).astype(np.int32), rng.integers(2, V, (200, 8)).astype(np.int32)
  keys_U = rng.integers(0, 2**32, (200, 2), dtype=np.uint32)
  whole = draw(tokens_UP, lengths_U, keys_U)
  np.testing.assert_array_equal(draw(tokens_UP, lengths_U, keys_U).logprobs_UNT, whole.logprobs_UNT)  # bit for bit
  wider_UP = np.pad(tokens_UP, ((0, 0), (0, 8)), constant_values=3)
  blocks = [slice(start, start + 40) for start in range(0, 200, 40)]
  parts = [draw(wider_UP[users], lengths_U[users], keys_U[users]) for users in blocks]
  batched = sampling.Samples(*(np.concatenate([getattr(part, field.name) for part in parts])
                               for field in dataclasses.fields(whole)))
  found = parted(whole, batched)
  assert all(gap(tokens_UP, lengths_U, keys_U, whole, *where) < 1e-4 for where in found)
  equal_UN = (whole.tokens_UNT == batched.tokens_UNT).all(-1)
  assert equal_UN.mean() > 0.99
  close(batched.logprobs_UN[equal_UN], whole.logprobs_UN[equal_UN])
  others = draw(tokens_UP[:40], lengths_U[:40], keys_U[:40] + 1)  # mutant: other noise
  assert max(gap(tokens_UP, lengths_U, keys_U, whole, *where) for where in parted(take(whole, slice(40)), others)) > 1e-2


def test_noise_differs_between_users_samples_and_seeds():
  twice = draw(TOKENS_UP[[0, 0]], LENGTHS_U[[0, 0]], KEYS_U[[0, 1]])
  assert (twice.tokens_UNT[0] != twice.tokens_UNT[1]).any()
  assert len(np.unique(twice.tokens_UNT[0], axis=0)) > 1


def chi_square(counts, probabilities):
  expected = counts.sum() * probabilities
  return ((counts - expected)**2 / expected).sum()


@functools.cache
def chosen(temperature: float, place: int, top_p: float = 1.0) -> np.ndarray:
  """20,000 choices from one distribution over 8 tokens, of which the last is forbidden."""
  logits_V = jnp.asarray(np.linspace(-1, 1.5, 8), jnp.float32)
  keys_R = sample_keys(np.arange(4).reshape(2, 2), 10_000).reshape(-1)
  logits_RV = jnp.broadcast_to(logits_V, (len(keys_R), 8))
  tokens_R, chosen_R = choose(logits_RV, keys_R, jnp.int32(place), jnp.arange(8) < 7, temperature, top_p)
  np.testing.assert_array_equal(chosen_R, logits_V[tokens_R])
  return np.asarray(tokens_R)


def softmax(logits):
  return np.exp(logits) / np.exp(logits).sum()


def test_frequencies_are_the_softmax_at_the_temperature_without_the_forbidden():
  logits = np.linspace(-1, 1.5, 8)[:7]
  counts = np.bincount(chosen(0.5, 0), minlength=8)
  assert counts[7] == 0
  assert chi_square(counts[:7], softmax(logits / 0.5)) < 27.9  # 6 degrees of freedom: 1 in 10,000
  assert chi_square(counts[:7], softmax(logits)) > 1000  # mutant: temperature 1


@pytest.mark.parametrize('top_p, kept', [(0.15, 1), (0.5, 2), (0.9, 5), (0.999, 7)])
def test_top_p_keeps_the_most_probable_tokens_that_have_it_together(top_p, kept):
  probabilities = softmax(np.linspace(-1, 1.5, 8)[:7] / 0.7)
  assert np.cumsum(probabilities[::-1])[kept - 1] >= top_p > np.cumsum(probabilities[::-1])[kept - 1] - probabilities[-kept]
  counts = np.bincount(chosen(0.7, 0, top_p), minlength=8)
  assert not counts[:7 - kept].any() and not counts[7]
  nucleus = probabilities[7 - kept:] / probabilities[7 - kept:].sum()
  assert chi_square(counts[7 - kept:7], nucleus) < 27.9


def test_the_nucleus_is_that_of_a_sort():
  scores_RV = np.random.default_rng(0).normal(size=(50, 200)).astype(np.float32) * 3
  bound_R1 = np.asarray(nucleus_bound(jnp.asarray(scores_RV), 0.7))
  for scores_V, bound in zip(scores_RV, bound_R1[:, 0], strict=True):
    downwards = np.sort(scores_V.astype(np.float64))[::-1]
    n = np.searchsorted(np.cumsum(softmax(downwards)), 0.7) + 1
    assert bound == np.float32(downwards[n - 1])


def test_choices_at_two_places_are_independent():
  pairs = np.bincount(chosen(1.0, 0) * 7 + chosen(1.0, 1), minlength=49)
  probabilities = softmax(np.linspace(-1, 1.5, 8)[:7])
  assert chi_square(pairs, np.outer(probabilities, probabilities).reshape(-1)) < 93.2  # 48 degrees: 1 in 10,000
  same_noise = np.bincount(chosen(1.0, 0) * 8, minlength=49)  # mutant: one noise for all places
  assert chi_square(same_noise, np.outer(probabilities, probabilities).reshape(-1)) > 1000


def test_the_first_tokens_of_samples_follow_the_model():
  samples = draw(TOKENS_UP[:1], LENGTHS_U[:1], KEYS_U[:1], n_samples=4000, max_new_tokens=1, temperature=2.0)
  expected = softmax(plain_logits(tuple(TOKENS_UP[0, :3].tolist()))[-1] / 2)
  counts = np.bincount(samples.tokens_UNT.reshape(-1), minlength=V)
  enough = expected * 4000 > 5
  assert enough.sum() >= 4
  assert chi_square(counts[enough], expected[enough] / expected[enough].sum()) < 37  # 10 degrees: 1 in 10,000


# Steps, shapes, bad input.


def test_sampling_stops_when_all_have_ended(monkeypatch):
  only = lambda *ids: ~np.isin(np.arange(V), ids)
  steps, samples = watched(monkeypatch, forbidden=only(EOS))
  assert len(steps) == 1 and samples.finished_UN.all() and not samples.lengths_UN.any()
  steps, samples = watched(monkeypatch, forbidden=only(EOS, 4), max_new_tokens=40, temperature=4.0)
  assert set(samples.tokens_UNT.reshape(-1).tolist()) == {EOS, 4}
  assert samples.finished_UN.all() and len(steps) == samples.lengths_UN.max() + 1 < 40


def test_there_are_few_programs():
  before = sampling.read_tokens._cache_size()
  options = {'n_samples': 16, 'max_new_tokens': 5}
  for keys_U in (KEYS_U, KEYS_U + 1, KEYS_U + 2):
    draw(keys_U=keys_U, **options)
  assert sampling.read_tokens._cache_size() <= before + sampling.LEVELS * 2
  assert [level(n, 32) for n in (1, 8, 9, 25, 32)] == [8, 8, 16, 32, 32]
  assert [level(n, 6) for n in (1, 2, 3, 5, 6)] == [2, 2, 4, 6, 6] and level(1, 1) == 1


@pytest.mark.parametrize('forbidden', [np.arange(V) == EOS, np.zeros(V + 1, bool)])
def test_a_mask_that_forbids_the_end_or_does_not_fit_is_an_error(forbidden):
  with pytest.raises(ValueError, match='forbidden'):
    draw(forbidden=forbidden)


VARIANTS = {
    'gemma2': {'layer_pattern': 'LG', 'window': 3, 'post_norms': True, 'norm_unit_offset': True, 'embed_scale': True,
               'attention_softcap': 2.0, 'logit_softcap': 3.0, 'query_scale': 0.3, 'activation': 'gelu'},
    'gemma3': {'layer_pattern': 'LLG', 'window': 4, 'local_rope_base': 10.0, 'qk_norm': True, 'rope_scaling': 'linear',
               'rope_factor': 8.0},
    'qwen2': {'qkv_bias': True, 'tied_head': False}, 'lora': {'lora_rank': 2}}


# Optimized, as a user's program is: it rounds less than the quick ones of `conftest.py`.
optimized = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})


@functools.partial(optimized, static_argnums=0)
def plain_forward(decoder, params, tokens_BL):
  positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
  states = decoder.apply({'params': params}, tokens_BL, jnp.ones_like(tokens_BL), positions_BL)
  return decoder.apply({'params': params}, states, method='logits')


def law_6(config: DecoderConfig, stepped: DecoderConfig) -> None:
  """Log-probabilities sampled with `stepped`'s decoder are those of a plain forward pass of `config`'s."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = nn.meta.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens, tokens + 1, tokens))['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 2 * x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), params)
  samples = draw(decoder=Decoder(stepped), params=params, n_samples=2, temperature=2.0, forbidden=np.arange(V) == 0)
  rows_BL = np.zeros((6, 8 + T), np.int32)
  for row_L, user, n in zip(rows_BL, np.repeat(range(3), 2), [0, 1] * 3, strict=True):
    row_L[:LENGTHS_U[user]] = TOKENS_UP[user, :LENGTHS_U[user]]
    row_L[LENGTHS_U[user]:LENGTHS_U[user] + T] = samples.tokens_UNT[user, n]
  logprobs = jax.nn.log_softmax(plain_forward(Decoder(config), params, rows_BL))
  for row, (row_L, user, n) in enumerate(zip(rows_BL, np.repeat(range(3), 2), [0, 1] * 3, strict=True)):
    count = samples.lengths_UN[user, n] + samples.finished_UN[user, n]
    places = LENGTHS_U[user] - 1 + np.arange(count)
    expected = float(np.asarray(logprobs)[row, places, row_L[places + 1]].sum())
    np.testing.assert_allclose(samples.logprobs_UN[user, n], expected, atol=2e-4)


@pytest.mark.parametrize('name', VARIANTS)
def test_steps_of_every_variant_are_a_plain_forward_pass(name):
  config = dataclasses.replace(DECODER.config, n_layers=4, **VARIANTS[name])
  law_6(config, config)


@pytest.mark.parametrize('mutant', [{'window': 5}, {'attention_softcap': None}, {'query_scale': None}])
def test_the_comparison_of_variants_fails_when_steps_have_another(mutant):
  config = dataclasses.replace(DECODER.config, n_layers=4, **VARIANTS['gemma2'])
  with pytest.raises(AssertionError):
    law_6(config, dataclasses.replace(config, **mutant))
