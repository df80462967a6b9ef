"""Converted SentencePiece models give the ids of the SentencePiece library, and the text back."""

import io
import json
import logging

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.data import histories
from calrec_jax.errors import UserError
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import TokenizerVocabulary, load_vocabulary

WORDS = ['steel', 'Kitchen', 'scissors', '3M', '2.5"', 'blue', 'größe', 'café', 'x'] + [f'brand{i}' for i in range(30)]
TEXTS = [' Title: ' + ' '.join(WORDS[(i * k) % len(WORDS)] for k in range(1, 7)) + f'. Price: ${i}.99.' for i in range(300)]
EXACT = {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False, 'byte_fallback': True}
RUNS = ['▁' * n for n in range(2, 6)]  # of spaces, as Gemma has them
KINDS = {
    'gemma': {'model_type': 'bpe', 'add_dummy_prefix': False, 'split_digits': True, 'allow_whitespace_only_pieces': True,
              'user_defined_symbols': ['\n', *RUNS, '<b>'], **EXACT},
    'llama_2': {'model_type': 'bpe', **EXACT},  # puts a space before a text: ours never does
    'unigram': {'model_type': 'unigram', 'add_dummy_prefix': False, **EXACT}}


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """Kind -> (the library's processor, our vocabulary)."""
  folder, made = tmp_path_factory.mktemp('sentencepiece'), {}
  for kind, options in KINDS.items():
    (folder / kind).mkdir()
    train(folder / kind / 'tokenizer.model', **options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / kind / 'tokenizer.model'))
    made[kind] = library, load_vocabulary(folder / kind)
  return made


def train(path, texts=TEXTS, size=480, **options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, vocab_size=size,
                                           hard_vocab_limit=False, minloglevel=2, **options)
  path.write_bytes(model.getvalue())


def expected(kind, library, text):
  """The library's ids; where it puts a space before the text, those of the text that has it already."""
  if kind != 'llama_2':
    return library.encode(text)
  return library.encode(text[1:]) if text.startswith(' ') else None


@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_the_librarys(pairs, kind):
  library, vocabulary = pairs[kind]
  assert vocabulary.vocab_size == library.vocab_size()
  for text in TEXTS:
    assert vocabulary.encode(text) == expected(kind, library, text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize('kind', ['gemma', 'unigram'])
@given(text=st.text(st.sampled_from('sbgr tecl.:$39ö☃日\n<b>▂'), max_size=30))
def test_ids_of_any_text_are_the_librarys_and_the_text_comes_back(pairs, kind, text):
  library, vocabulary = pairs[kind]
  assert vocabulary.encode(text) == library.encode(text)
  assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_run_of_spaces_is_cut_into_the_longest_pieces_first(pairs):
  library, vocabulary = pairs['gemma']
  for n in range(1, 14):
    text = 'a' + ' ' * n + 'blue'
    assert vocabulary.encode(text) == library.encode(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text
  text = 'a' + ' ' * 6 + 'blue'
  assert mutant(vocabulary, lambda spec: spec.update(added_tokens=[])).encode(text) != library.encode(text)


def test_the_order_of_merges_decides(pairs):
  library, vocabulary = pairs['gemma']
  late_first = mutant(vocabulary, lambda spec: spec['model']['merges'].reverse())
  assert late_first.encode_batch(TEXTS) != library.encode(TEXTS) == vocabulary.encode_batch(TEXTS)


def mutant(vocabulary, change):
  spec = json.loads(vocabulary._spec)
  change(spec)
  return TokenizerVocabulary(json.dumps(spec))


def test_special_pieces_are_never_read_from_text_nor_written_to_it(pairs):
  for library, vocabulary in pairs.values():
    specials = {library.piece_to_id(piece) for piece in ('<s>', '</s>', '<unk>')}
    assert not specials & set(vocabulary.encode('a </s> b <s> <unk>'))
    assert vocabulary.decode(vocabulary.encode('a </s> b <s>')) == 'a </s> b <s>'
    assert vocabulary.decode([vocabulary.bos_id, *vocabulary.encode(' x')]) == ' x'
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (library.bos_id(), library.eos_id(), library.unk_id())
  whole = mutant(pairs['unigram'][1], lambda spec: spec.update(pre_tokenizer=None))
  assert whole.encode('a </s>')[-1] == whole.eos_id  # the mutant: nothing hides '</s>' from the table


@pytest.mark.parametrize('kind, text', [('bpe', 'a ☃日 blue'), ('unigram', 'a ☃日 blue')])
def test_without_bytes_a_run_of_unknown_letters_is_one_unknown_token(tmp_path, kind, text):
  train(tmp_path / 'm.model', **KINDS['gemma'] | {'model_type': kind, 'byte_fallback': False})
  library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'm.model'))
  vocabulary = load_vocabulary(tmp_path / 'm.model')
  assert vocabulary.encode(text) == library.encode(text) and vocabulary.encode(text).count(vocabulary.unk_id) == 1


def test_bos_is_left_out_where_the_configuration_says_so(tmp_path):
  train(tmp_path / 'tokenizer.model', **KINDS['gemma'])
  (tmp_path / 'tokenizer_config.json').write_text('{"add_bos_token": false, "eos_token": {"content": "<b>"}}')
  vocabulary = load_vocabulary(tmp_path)
  assert vocabulary.bos_id is None and vocabulary.token(vocabulary.eos_id) == '<b>'
  assert load_vocabulary(tmp_path, bos_token='<s>', eos_token='</s>').bos_id == 1


def test_a_saved_vocabulary_is_equal(pairs, tmp_path):
  for kind, (_, vocabulary) in pairs.items():
    vocabulary.save(tmp_path / f'{kind}.json')
    assert load_vocabulary(tmp_path / f'{kind}.json') == vocabulary
    assert load_vocabulary(tmp_path / f'{kind}.json').bos_id == vocabulary.bos_id


def test_a_normaliser_that_rewrites_text_is_told_of(tmp_path, caplog):
  train(tmp_path / 'lossy.model', model_type='unigram', byte_fallback=True, normalization_rule_name='nmt_nfkc')
  library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'lossy.model'))
  with caplog.at_level(logging.WARNING):
    vocabulary = load_vocabulary(tmp_path / 'lossy.model')
  assert 'nmt_nfkc' in caplog.text and vocabulary.decode(vocabulary.encode('ﬁne')) == 'fine'
  for text in ['steel  scissors ﬁne\tx', *TEXTS[:20]]:
    assert vocabulary.encode(' ' + text.strip()) == library.encode(text)


@pytest.mark.parametrize('content, message', [(b'no model at all', 'not a whole SentencePiece model'), (None, 'cannot be read'),
                                              (b'', 'not a whole SentencePiece model')])
def test_another_file_is_named(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'tokenizer.model').write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    load_vocabulary(tmp_path / 'tokenizer.model')
  assert '\n' not in str(error.value)


def test_a_truncated_model_is_named(tmp_path):
  path = tmp_path / 'tokenizer.model'
  train(path, **KINDS['gemma'])
  whole = path.read_bytes()
  for size in range(0, len(whole) - 1, 97):
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match='not a whole SentencePiece model.*download it again'):
      load_vocabulary(path)


def test_another_kind_of_model_is_named(tmp_path):
  train(tmp_path / 'chars.model', size=40, model_type='char')
  with pytest.raises(UserError, match=r'chars.model: a SentencePiece model of the kind CHAR; known are BPE and UNIGRAM'):
    load_vocabulary(tmp_path / 'chars.model')


@pytest.mark.parametrize('kind', ['gemma', 'unigram'])
def test_real_items_have_the_librarys_ids_and_come_back(pairs, real_data, kind):
  library, vocabulary = pairs[kind]
  texts = [' ' + ItemTemplate().item_text(item) for item in histories.load(real_data / 'histories/scientific2018').items]
  ids = vocabulary.encode_batch(texts)
  assert ids == library.encode(texts)
  assert [vocabulary.decode(row) for row in ids] == texts
