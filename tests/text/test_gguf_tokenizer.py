"""The tokenizer inside a GGUF file: cut and merged as the published ones, specials kept apart."""

import json

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from calrec_jax.data import histories
from calrec_jax.errors import UserError
from calrec_jax.text import gguf_tokenizer, sentencepiece_model, vocabularies
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import load_vocabulary

TEXTS = [f' Title: Stainless steel No. {i * 37} scissors, 2.5" x {i}. Price: ${i}.99. It\'s  blue\n\nyou\'LL see größe ☃'
         for i in range(60)]


def byte_level(pre: str):
  """(metadata, the tokenizer that they were taken from), cut as `pre` says."""
  cut = gguf_tokenizer._PRE_TOKENIZERS[pre]
  tokenizer = tokenizers.Tokenizer(models.BPE())
  spec = json.loads(tokenizer.to_str()) | {'pre_tokenizer': cut}
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
  tokenizer.train_from_iterator(TEXTS, BpeTrainer(vocab_size=600, special_tokens=['<|end|>', '<|begin|>'], show_progress=False,
                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  model = json.loads(tokenizer.to_str())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  return {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': pre, 'tokenizer.ggml.tokens': tokens,
          'tokenizer.ggml.token_type': [3, 3] + [1] * (len(tokens) - 2), 'tokenizer.ggml.bos_token_id': 1,
          'tokenizer.ggml.merges': [' '.join(merge) for merge in model['merges']], 'tokenizer.ggml.eos_token_id': 0}, tokenizer


def vocabulary(metadata):
  spec, bos, eos = gguf_tokenizer.read(metadata, 'test')
  return vocabularies._vocabulary(spec, bos=bos, eos=eos)


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_ids_are_those_of_the_tokenizer_and_the_text_comes_back(pre):
  metadata, original = byte_level(pre)
  ours = vocabulary(metadata)
  for text in TEXTS:
    assert ours.encode(text) == original.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
  assert ours.eos_id == 0 and (ours.bos_id == 1) == (pre == 'llama-bpe')
  assert not {0, 1} & set(ours.encode('a <|end|> b <|begin|>'))


def test_qwens_ids_are_those_of_transformers():
  metadata, _ = byte_level('qwen2')
  tokens, merges = metadata['tokenizer.ggml.tokens'], metadata['tokenizer.ggml.merges']
  theirs = transformers.Qwen2Tokenizer(
      vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(merge.split(' ')) for merge in merges])
  texts = [*TEXTS, ' Schu\u0308ssel 12½  \r\n']  # Qwen joins the letter and its mark
  assert vocabulary(metadata).encode_batch(texts) == theirs(texts).input_ids
  assert vocabulary(metadata | {'tokenizer.ggml.pre': 'gpt-2'}).encode_batch(texts) != theirs(texts).input_ids


def pieces(pre, text):
  return [ours for ours, _ in tokenizers.Tokenizer.from_str(json.dumps({
      'version': '1.0', 'added_tokens': [], 'pre_tokenizer': gguf_tokenizer._PRE_TOKENIZERS[pre],
      'model': {'type': 'BPE', 'vocab': {}, 'merges': []}})).pre_tokenizer.pre_tokenize_str(text)]


def test_numbers_are_cut_as_each_model_does():
  assert pieces('gpt-2', 'a 12345') == ['a', 'Ġ12345']
  assert pieces('smollm', 'a 12345') == ['a', 'Ġ', '1', '2', '3', '4', '5']
  assert pieces('llama-bpe', 'a 12345') == ['a', 'Ġ', '123', '45']
  assert pieces('qwen2', 'a 12345') == ['a', 'Ġ', '1', '2', '3', '4', '5']
  assert pieces('llama-bpe', "you'LL  see\n\n") == ['you', "'LL", 'Ġ', 'Ġsee', 'ĊĊ']


def test_a_whole_word_that_is_a_token_is_taken_by_llama_3():
  metadata, _ = byte_level('llama-bpe')
  metadata['tokenizer.ggml.tokens'].append('zqzqzq')  # no merges lead to it
  metadata['tokenizer.ggml.token_type'].append(1)
  assert vocabulary(metadata).encode('zqzqzq') == [len(metadata['tokenizer.ggml.tokens']) - 1]
  assert len(vocabulary(metadata | {'tokenizer.ggml.pre': 'qwen2'}).encode('zqzqzq')) > 1


def test_sentencepiece_inside_a_gguf_is_sentencepiece(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / 'm'), vocab_size=420, model_type='bpe', byte_fallback=True,
      normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
      hard_vocab_limit=False, user_defined_symbols=['▁▁', '▁▁▁'])
  library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'm.model'))
  size = library.vocab_size()
  kinds = [2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i) else 1 for i in range(size)]
  runs = [library.piece_to_id(piece) for piece in ('▁▁', '▁▁▁')]
  for i in runs:
    kinds[i] = 4
  metadata = {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': [library.id_to_piece(i) for i in range(size)],
              'tokenizer.ggml.scores': [library.get_score(i) for i in range(size)], 'tokenizer.ggml.token_type': kinds,
              'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2}
  ours = vocabulary(metadata)
  assert ours.encode_batch(TEXTS) == library.encode(TEXTS) and (ours.bos_id, ours.eos_id) == (1, 2)
  assert ours == load_vocabulary(tmp_path / 'm.model')
  for i in runs:  # llama.cpp writes those of Gemma with spaces
    metadata['tokenizer.ggml.tokens'][i] = metadata['tokenizer.ggml.tokens'][i].replace('▁', ' ')
  ours, texts = vocabulary(metadata), [f'a{" " * n}blue' for n in range(9)]
  assert ours.encode_batch(texts) == library.encode(texts) and list(map(ours.decode, library.encode(texts))) == texts
  assert vocabulary(metadata | {'tokenizer.ggml.add_bos_token': False}).bos_id is None


@pytest.mark.parametrize('metadata, message', [
    ({'tokenizer.ggml.model': 'bert', 'tokenizer.ggml.tokens': ['a']}, "kind 'bert'; known are gpt2"), ({}, 'kind None'),
    ({'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.tokens': ['a'], 'tokenizer.ggml.pre': 'tekken'}, "as 'tekken'; known"),
    ({'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.tokens': ['a']}, 'cuts text as None; known are default, gpt-2')])
def test_another_kind_is_named(metadata, message):
  with pytest.raises(UserError, match=message) as error:
    gguf_tokenizer.read(metadata, 'model.gguf')
  assert 'model.gguf' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('pre', ['smollm', 'llama-bpe'])
def test_real_items_come_back(pre, real_data):
  ours = vocabulary(byte_level(pre)[0])
  for name in ('scientific2018', 'office2014'):
    texts = [' ' + ItemTemplate().item_text(item) for item in histories.load(real_data / 'histories' / name).items]
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts


@pytest.mark.parametrize('pre', ['smollm', 'llama-bpe'])
def test_transformers_reads_what_is_written_for_it(pre, tmp_path):
  ours = vocabulary(byte_level(pre)[0])
  ours.write_huggingface(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  bos = [] if ours.bos_id is None else [ours.bos_id]
  for text in TEXTS[:10]:
    assert theirs(text).input_ids == bos + ours.encode(text)
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
  assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, ours.bos_id)
  assert theirs.pad_token_id is not None
  assert load_vocabulary(tmp_path).encode(TEXTS[0]) == ours.encode(TEXTS[0]) and load_vocabulary(tmp_path).eos_id == ours.eos_id
  assert sentencepiece_model.CONTROL == 3 and ours.token(ours.eos_id) == '<|end|>'
