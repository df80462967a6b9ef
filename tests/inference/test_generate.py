"""Generation for a whole data set: one outcome for any batching, resumed to the same bytes, bad input named."""

import dataclasses
import functools
import gzip
import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.generations import read_generations, shares
from calrec_jax.inference import generate as module
from calrec_jax.inference.generate import generate, merge, text_shares
from calrec_jax.inference.sampling import Samples
from calrec_jax.inference.trie import build_trie
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.text.item_tokens import ItemTokens, item_tokens, load_item_tokens
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

TEMPLATE = ItemTemplate(fields=('title',))
TITLES = ['Glue', 'Hose', 'Strong duct tape of steel', 'Nails']
ITEMS = [{'title': title, 'category': '', 'brand': '', 'price': ''} for title in TITLES]
TEXTS = [TEMPLATE.item_text(item) for item in ITEMS]
VOCABULARY = train_vocabulary(TEXTS, size=280, phrases=template_phrases(TEMPLATE))
TABLE = item_tokens(TEXTS, VOCABULARY)
DECODER = Decoder(DecoderConfig(vocab_size=VOCABULARY.vocab_size + 3, n_layers=1, embed_dim=8, n_heads=2, n_kv_heads=1,
                                head_dim=4, ff_dim=8, dtype='float32'))
SEQUENCES = {'u0': [0, 1, 2], 'u1': [2, 3, 2, 1, 0, 2], 'short': [1, 2], 'u2': [3, 3, 1], 'u3': [1, 0, 3, 2],
             'u4': [2, 2, 3], 'ünï 5': [0, 1, 3, 2]}
USERS = [user for user in SEQUENCES if user != 'short']


def shop(users=tuple(SEQUENCES)):
  sequences = [SEQUENCES[user] for user in users]
  return Histories('shop', list(users), list('abcd'), ITEMS, np.cumsum([0, *map(len, sequences)]),
                   np.array(sum(sequences, []), np.int32))


@functools.cache
def parameters():
  tokens = jnp.zeros((1, 4), jnp.int32)
  return nn.meta.unbox(jax.jit(DECODER.init)(jax.random.key(0), tokens, tokens + 1, tokens))['params']


def run(out, **kwargs):
  options = {'decoder': DECODER, 'params': decoding.by_layer(parameters()), 'vocabulary': VOCABULARY, 'histories': shop(),
             'item_tokens': TABLE, 'identity': 'checkpoint 1', 'n_samples': 3, 'temperature': 1.0, 'max_new_tokens': 5,
             'users_per_batch': 2, 'bucket': 8} | kwargs
  return generate(out=out, **options)


def lines(path):
  return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_each_user_has_a_line_in_the_order_of_the_histories(tmp_path):
  report = run(tmp_path / 'a.gz')
  rows = lines(tmp_path / 'a.gz')
  assert [row['user_id'] for row in rows] == USERS
  assert all(set(row) == {'user_id', 'texts', 'logprobs', 'finished'} for row in rows)
  assert all(row['logprobs'] == sorted(row['logprobs'], reverse=True) and max(row['logprobs']) < 0 for row in rows)
  assert all(len(set(row['texts'])) == len(row['texts']) <= 3 for row in rows)
  assert [path.name for path in tmp_path.iterdir()] == ['a.gz']
  assert report['users'] == 6 and report['users_resumed'] == 0 and report['max_new_tokens'] == 5
  judged = shares(read_generations(tmp_path / 'a.gz').values(), frozenset(TEXTS))
  assert {name: report[name] for name in ('unfinished', 'empty', 'exact_match')} == {
      name: judged[name] for name in ('unfinished', 'empty', 'exact_match')}


def by_user(path):
  return {row['user_id']: row for row in lines(path)}


def same(a, b):
  for user in a:
    assert a[user]['texts'] == b[user]['texts'] and a[user]['finished'] == b[user]['finished']
    np.testing.assert_allclose(a[user]['logprobs'], b[user]['logprobs'], rtol=1e-5)


def test_batches_buckets_and_order_change_nothing(tmp_path):
  run(tmp_path / 'a.gz')
  expected = by_user(tmp_path / 'a.gz')
  run(tmp_path / 'b.gz', users_per_batch=3, bucket=24)
  same(expected, by_user(tmp_path / 'b.gz'))
  run(tmp_path / 'c.gz', histories=shop(tuple(SEQUENCES)[::-1]))
  assert [row['user_id'] for row in lines(tmp_path / 'c.gz')] == USERS[::-1]
  same(expected, by_user(tmp_path / 'c.gz'))
  run(tmp_path / 'd.gz', seed=1)
  with pytest.raises(AssertionError):
    same(expected, by_user(tmp_path / 'd.gz'))


def test_noise_that_depends_on_the_place_in_a_batch_is_found_out(tmp_path, monkeypatch):
  by_row = lambda seed, ids_U: np.arange(2 * len(ids_U), dtype=np.uint32).reshape(-1, 2)
  monkeypatch.setattr(module, 'user_keys', by_row)
  run(tmp_path / 'b.gz')
  run(tmp_path / 'c.gz', histories=shop(tuple(SEQUENCES)[::-1]))
  with pytest.raises(AssertionError):
    same(by_user(tmp_path / 'b.gz'), by_user(tmp_path / 'c.gz'))


def test_max_users_takes_the_first(tmp_path):
  run(tmp_path / 'all.gz')
  report = run(tmp_path / 'some.gz', max_users=3)
  assert report['users'] == 3 and list(by_user(tmp_path / 'some.gz')) == USERS[:3]
  same(by_user(tmp_path / 'some.gz'), by_user(tmp_path / 'all.gz'))


class Stopped(BaseException):
  """As Ctrl-C or SIGTERM would."""


def stop_after(monkeypatch, n_batches, calls):
  def stopping(*args, **kwargs):
    if len(calls) == n_batches:
      raise Stopped
    calls.append(0)
    return sample(*args, **kwargs)
  sample = module.sample
  monkeypatch.setattr(module, 'sample', stopping)


@pytest.mark.parametrize('n_batches, cut_bytes', [(0, 0), (1, 0), (2, 0), (2, 9), (3, 0)])
def test_stopped_and_resumed_gives_the_bytes_of_a_run_that_was_not_stopped(tmp_path, monkeypatch, n_batches, cut_bytes):
  run(tmp_path / 'whole.gz')
  out, part = tmp_path / 'a.gz', tmp_path / 'a.gz.partial'
  with monkeypatch.context() as patch:
    stop_after(patch, n_batches, [])
    with pytest.raises(Stopped):
      run(out)
  assert not out.exists()
  if cut_bytes:  # the last batch was being written
    part.write_bytes(part.read_bytes()[:-cut_bytes])
  calls = []
  with monkeypatch.context() as patch:
    stop_after(patch, 99, calls)
    report = run(out)
  assert out.read_bytes() == (tmp_path / 'whole.gz').read_bytes()
  assert len(calls) == 4 - n_batches + bool(cut_bytes) and not part.exists()
  assert (report['users_resumed'] > 0) == (n_batches - bool(cut_bytes) > 0)


def test_what_the_model_reads_is_the_context_without_the_target(tmp_path, monkeypatch):
  seen = {}

  def reading(decoder, params, tokens_UP, lengths_U, bos):
    read.append([VOCABULARY.decode(tokens_P[:length].tolist()) for tokens_P, length in zip(tokens_UP, lengths_U, strict=True)])
    return prefill(decoder, params, tokens_UP, lengths_U, bos)

  def keyed(decoder, params, prefix, keys_U, **kwargs):
    seen.update(zip(map(tuple, keys_U.tolist()), read[-1], strict=True))
    return sample(decoder, params, prefix, keys_U, **kwargs)
  read, prefill, sample = [], module.prefill, module.sample
  monkeypatch.setattr(module, 'prefill', reading)
  monkeypatch.setattr(module, 'sample', keyed)
  key = tuple(module.user_keys(0, ['u1'])[0].tolist())
  for split, items in (('test', [2, 3, 2, 1, 0]), ('validation', [2, 3, 2, 1])):
    run(tmp_path / f'{split}.gz', split=split)
    texts = seen[key].split('Title: ')[1:]
    assert [text.split('.')[0] for text in texts] == [TITLES[item] for item in items]
    assert seen[key].endswith('The next item bought is as follows.')
  longest = 1 + int(np.diff(TABLE.offsets).max()) + 1
  report = run(tmp_path / 'cut.gz', max_prefix_length=longest)
  assert report['users_cut'] > 0 and seen[key].count('Title:') < 5


def fake(tokens_by_sample):
  """A sampler that writes these texts; None is an unfinished one."""
  def sampler(decoder, params, prefix, keys_U, *, max_new_tokens, eos_id, **kwargs):
    U, N = len(keys_U), len(tokens_by_sample)
    tokens_UNT = np.full((U, N, max_new_tokens), eos_id, np.int32)
    for n, tokens in enumerate(tokens_by_sample):
      tokens_UNT[:, n, :len(tokens)] = tokens
    lengths_UN = np.tile(np.array([len(tokens) for tokens in tokens_by_sample], np.int32), (U, 1))
    logprobs_UNT = np.zeros(tokens_UNT.shape, np.float32)
    logprobs_UNT[:, :, 0] = -np.arange(1, N + 1)
    return Samples(tokens_UNT, lengths_UN, logprobs_UNT, lengths_UN < max_new_tokens)
  return sampler


def test_texts_are_decoded_without_the_leading_space_merged_and_counted(tmp_path, monkeypatch):
  glue, hose = TABLE.item(0), TABLE.item(1)
  twin = VOCABULARY.encode(' Title:') + [token for byte in ' Glue.' for token in VOCABULARY.encode(byte)]
  assert len(twin) > len(glue)
  monkeypatch.setattr(module, 'sample', fake([twin, hose, glue, hose[:-1], []]))
  report = run(tmp_path / 'a.gz', n_samples=5, max_new_tokens=len(twin) + 1)
  for row in lines(tmp_path / 'a.gz'):
    assert row['texts'] == ['Title: Glue.', 'Title: Hose.', VOCABULARY.decode(hose[:-1].tolist()).strip(), '']
    assert row['logprobs'] == [-1, -2, -4, -5] and all(row['finished'])
  n_tokens = len(twin) + len(glue) + 2 * len(hose) - 1
  expected = {'texts_per_user': 4, 'unfinished': 0, 'empty': 0.25, 'exact_match': 0.5, 'mean_tokens': n_tokens / 5}
  assert {name: report[name] for name in expected} == expected


def test_merging_prefers_finished_then_probable_and_breaks_ties_by_text():
  assert merge(['b', 'a', 'b', 'b', 'c', 'c'], [-1, -3, -5, -3, -9, -8], [False, True, True, True, False, False]) == {
      'texts': ['a', 'b', 'c'], 'logprobs': [-3, -3, -8], 'finished': [True, True, False]}


def test_shares_counted_by_hand():
  rows = [{'texts': ['x', ''], 'finished': [True, True], 'tokens': 5}, {'texts': [' ', 'y'], 'finished': [False, False],
                                                                       'tokens': 3}]
  assert text_shares(rows, {'y'}, 2) == {
      'texts_per_user': 2, 'unfinished': 0.5, 'empty': 0.5, 'exact_match': 0.25, 'mean_tokens': 2}


def test_the_longest_text_is_the_catalogues_percentile_and_its_end():
  table = ItemTokens(np.zeros(0, np.int32), np.cumsum([0] + [10] * 5000 + [90]))
  assert module.default_max_new_tokens(table, 64) == 11
  assert module.default_max_new_tokens(ItemTokens(table.tokens, np.array([0, 90])), 64) == 65


def test_a_mapped_table_is_as_good_as_one_in_memory(tmp_path):
  mapped = load_item_tokens(tmp_path, shop(), TEMPLATE, VOCABULARY)
  assert not mapped.tokens.flags.writeable and not mapped.offsets.flags.writeable
  expected = hashlib.sha256(TABLE.offsets.astype('<i8').tobytes() + TABLE.tokens.astype('<i4').tobytes()).hexdigest()
  assert module._digest(mapped) == module._digest(TABLE) == expected
  assert module.catalogue_texts(mapped, VOCABULARY) == module.catalogue_texts(TABLE, VOCABULARY) == set(TEXTS)
  tries = [build_trie(table, max_item_tokens=64, eos_id=VOCABULARY.eos_id) for table in (mapped, TABLE)]
  for field in dataclasses.fields(tries[0]):
    np.testing.assert_array_equal(*(getattr(trie, field.name) for trie in tries))
  run(tmp_path / 'mapped.gz', item_tokens=mapped)
  run(tmp_path / 'memory.gz')
  assert (tmp_path / 'mapped.gz').read_bytes() == (tmp_path / 'memory.gz').read_bytes()


def test_forbidden_are_the_specials_and_the_rows_without_a_token():
  forbidden_V = module.forbidden_ids(VOCABULARY, DECODER.config.vocab_size)
  assert np.flatnonzero(forbidden_V).tolist() == [VOCABULARY.pad_id, *range(VOCABULARY.vocab_size, len(forbidden_V))]


def test_an_id_0_that_is_not_padding_may_be_sampled():
  class Bare:
    """A vocabulary that has no padding token: its pad_id 0 is a letter, its end is its BOS too."""
    vocab_size, pad_id, bos_id, eos_id = 4, 0, 3, 3
    decode = staticmethod(lambda ids: ''.join('abc_'[i] for i in ids))
  assert not module.forbidden_ids(Bare(), 4).any()


# Bad input.


@pytest.mark.parametrize('wrong, named', [
    ({'split': 'train'}, "split = 'train'"), ({'temperature': -1.0}, 'temperature = -1.0'),
    ({'temperature': float('nan')}, 'temperature = nan'), ({'top_p': 0.0}, 'top_p = 0.0'),
    ({'top_p': 1.5}, 'top_p = 1.5'), ({'n_samples': 0}, 'n_samples = 0'),
    ({'max_new_tokens': 0}, 'max_new_tokens = 0'), ({'users_per_batch': 0}, 'users_per_batch = 0'),
    ({'max_users': 0}, 'max_users = 0'), ({'bucket': 0}, 'bucket = 0'), ({'max_item_tokens': 0}, 'max_item_tokens = 0'),
    ({'max_prefix_length': 2}, 'max_prefix_length = 2'), ({'histories': shop(('short',))}, 'no user has three'),
    ({'decoder': Decoder(DecoderConfig(vocab_size=9))}, 'the model 9')])
def test_bad_input_is_named_and_leaves_nothing(tmp_path, wrong, named):
  with pytest.raises(UserError, match=named):
    run(tmp_path / 'a.gz', **wrong)
  assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_not_touched(tmp_path):
  (tmp_path / 'a.gz').write_text('mine')
  with pytest.raises(UserError, match='already there'):
    run(tmp_path / 'a.gz')
  assert (tmp_path / 'a.gz').read_text() == 'mine'


def test_a_partial_file_of_other_settings_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    stop_after(patch, 1, [])
    with pytest.raises(Stopped):
      run(tmp_path / 'a.gz')
  for other, named in (({'identity': 'checkpoint 2'}, 'identity'), ({'temperature': 0.9}, '1.0 there, 0.9 now'),
                       ({'histories': shop(tuple(USERS))}, 'data'), ({'seed': 5}, 'seed'), ({'bucket': 16}, 'bucket')):
    with pytest.raises(UserError, match=f'other settings.*{named}'):
      run(tmp_path / 'a.gz', **other)
  assert not (tmp_path / 'a.gz').exists()


def test_a_model_that_has_diverged_is_named(tmp_path):
  broken = decoding.by_layer(jax.tree.map(lambda x: x * np.nan, parameters()))
  with pytest.raises(UserError, match='checkpoint 1: .* not finite'):
    run(tmp_path / 'a.gz', params=broken)
  assert not (tmp_path / 'a.gz').exists()
