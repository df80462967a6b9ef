"""Text survives its tokens, specials never come from text, and a vocabulary is known by its content."""

import gzip
import itertools
import json
import pickle
import subprocess
import sys

import pytest
import tensorflow as tf
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from calrec_jax.errors import UserError
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate, text_pair
from calrec_jax.text.vocabularies import (
    TokenizerVocabulary,
    load_vocabulary,
    template_phrases,
    train_vocabulary,
)

TEMPLATE = ItemTemplate()
PHRASES = template_phrases(TEMPLATE)
ITEMS = [{'title': f'{colour} {thing}', 'category': 'Kitchen, Cups', 'brand': brand, 'price': ''}
         for colour in ('Blue', 'Green') for thing in ('cup', 'bowl', 'Schüssel') for brand in ('Acme', '')]
TEXTS = [' ' + TEMPLATE.item_text(item) for item in ITEMS]
SIZE = 330
VOCABULARY = train_vocabulary(TEXTS, size=SIZE, phrases=PHRASES)

texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(PHRASES + ['</s>', '<pad>', ' Title', '. Price'])),
                 max_size=6).map(''.join)


def tokens(vocabulary: TokenizerVocabulary, text: str) -> list[str]:
  return [vocabulary.decode([i]) for i in vocabulary.encode(text)]


@given(texts)
def test_decoding_gives_the_text_back(text):
  ids = VOCABULARY.encode(text)
  assert VOCABULARY.decode(ids) == text
  assert not {VOCABULARY.pad_id, VOCABULARY.eos_id} & set(ids)


def test_the_round_trip_fails_for_a_vocabulary_that_adds_a_space():
  # The mutant: a prefix space, as GPT-2's tokenizer can add it.
  spec = json.loads(VOCABULARY._spec)
  spec['pre_tokenizer']['add_prefix_space'] = True
  mutant = TokenizerVocabulary(json.dumps(spec))
  assert mutant.decode(mutant.encode('cup')) == ' cup'


def test_ids_of_a_vocabulary_trained_here():
  assert (VOCABULARY.pad_id, VOCABULARY.eos_id, VOCABULARY.bos_id, VOCABULARY.unk_id) == (0, 1, None, None)
  assert 256 + 2 + len(PHRASES) < VOCABULARY.vocab_size <= SIZE


def test_a_phrase_is_one_token_wherever_it_stands():
  assert {FIRST, NEXT, ' Title:', '. Category:', '. Brand:', '. Price:', '. Price: Unknown.'} <= set(PHRASES)
  for phrase in PHRASES:
    assert len(VOCABULARY.encode(phrase)) == 1
    assert phrase in tokens(VOCABULARY, 'Schüs' + phrase + 'sel')


def test_an_item_costs_few_tokens():
  assert tokens(VOCABULARY, ' Title: Blue cup. Category: Kitchen, Cups. Brand: Unknown. Price: Unknown.') == [
      ' Title:', ' Blue', ' cup', '. Category:', ' Kitchen', ',', ' Cups', '. Brand: Unknown', '. Price: Unknown.']


@pytest.mark.parametrize('template', [ItemTemplate(fields=('title',)), ItemTemplate(unknown='skip'),
                                      ItemTemplate(fields=('brand', 'title'))])
def test_each_template_has_its_own_phrases(template):
  written = [template.item_text(item) for item in ITEMS]
  vocabulary = train_vocabulary(written, size=SIZE, phrases=template_phrases(template))
  inputs, targets = text_pair(written)
  assert vocabulary.decode(vocabulary.encode(inputs) + vocabulary.encode(targets)) == inputs + targets
  assert tokens(vocabulary, targets)[0].startswith(f' {template.fields[0].capitalize()}:')


def test_special_tokens_in_a_title_stay_text():
  text = ' Title: </s><pad> cup.'
  assert VOCABULARY.decode(VOCABULARY.encode(text)) == text
  assert VOCABULARY.eos_id not in VOCABULARY.encode(text)


def test_decoding_stops_at_eos():
  cup = VOCABULARY.encode(' cup')
  assert VOCABULARY.decode(cup + [VOCABULARY.eos_id] + cup) == ' cup'
  assert VOCABULARY.decode(cup + [0, 0]) == ' cup'
  assert VOCABULARY.decode([]) == ''


def test_no_merge_crosses_a_phrase():
  # Without the cut at phrases, training would merge what stands around them in every text.
  vocabulary = train_vocabulary(['xy' + NEXT + 'zw'] * 100, size=400, phrases=[NEXT])
  assert tokens(vocabulary, 'xy' + NEXT + 'zw') == ['xy', NEXT, 'zw']
  assert vocabulary.vocab_size == 2 + 256 + 1 + 2  # specials, bytes, NEXT, 'xy' and 'zw': nothing of the phrase


def test_a_batch_is_encoded_as_its_texts_one_by_one():
  assert VOCABULARY.encode_batch(TEXTS) == [VOCABULARY.encode(text) for text in TEXTS]
  assert VOCABULARY.encode_batch([]) == []


def test_tensorflow_agrees_with_python():
  dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(VOCABULARY.encode_tf)
  assert [ids.tolist() for ids in dataset.as_numpy_iterator()] == VOCABULARY.encode_batch(TEXTS)
  assert VOCABULARY.encode_tf(tf.constant(TEXTS[0])).numpy().tolist() == VOCABULARY.encode(TEXTS[0])
  cup, bowl = VOCABULARY.encode(' cup'), VOCABULARY.encode(' bowl')
  rows = tf.constant([(ids + [1] + bowl + [0] * 9)[:9] for ids in (cup, bowl)], tf.int32)
  assert [text.decode() for text in VOCABULARY.decode_tf(rows).numpy()] == [' cup', ' bowl']
  assert VOCABULARY.decode_tf(tf.constant(cup)).numpy().decode() == ' cup'


def test_training_is_deterministic_and_depends_on_what_is_given():
  code = ('import sys, json; from calrec_jax.text.vocabularies import train_vocabulary as train; '
          'texts, size, phrases = json.load(sys.stdin); print(train(texts, size=size, phrases=phrases).fingerprint)')
  other = subprocess.run([sys.executable, '-c', code], input=json.dumps([TEXTS, SIZE, PHRASES[::-1]]), text=True,
                         capture_output=True, check=True)
  assert other.stdout.strip() == VOCABULARY.fingerprint
  assert train_vocabulary(TEXTS, size=290, phrases=PHRASES) != VOCABULARY
  assert train_vocabulary(TEXTS, size=SIZE, phrases=PHRASES[:-1]) != VOCABULARY


def test_a_tiny_catalogue_gives_a_smaller_vocabulary():
  assert train_vocabulary(['a'], size=1000, phrases=PHRASES).vocab_size == 258 + len(PHRASES)


def test_a_size_without_room_for_the_bytes_is_refused():
  with pytest.raises(UserError, match=r'100 tokens is too small: 256 bytes'):
    train_vocabulary(TEXTS, size=100, phrases=PHRASES)


def test_saved_loaded_and_pickled_are_equal(tmp_path):
  VOCABULARY.save(tmp_path / 'a' / 'vocabulary.json')
  loaded = load_vocabulary(tmp_path / 'a' / 'vocabulary.json')
  assert loaded == VOCABULARY == pickle.loads(pickle.dumps(VOCABULARY))
  assert hash(loaded) == hash(VOCABULARY)
  assert loaded.encode_batch(TEXTS) == VOCABULARY.encode_batch(TEXTS)
  loaded.save(tmp_path / 'b.json')
  assert (tmp_path / 'b.json').read_bytes() == (tmp_path / 'a' / 'vocabulary.json').read_bytes()
  assert load_vocabulary(tmp_path / 'b.json').fingerprint == VOCABULARY.fingerprint


# Tokenizers from elsewhere


def _trained(kind: str) -> tokenizers.Tokenizer:
  """A small BPE tokenizer as pretrained models have them; each of them puts a space before a text."""
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=kind != 'byte_level'))
  alphabet = []
  if kind == 'byte_level':  # GPT-2's
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
  elif kind == 'metaspace':  # T5's, newer Llama's
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme='always')])
  else:  # Llama 2's
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(' ', 1, 0)])
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=700, special_tokens=['<unk>', '<s>', '</s>', '<|end|>'] + [f'<0x{byte:02X}>' for byte in range(256)],
      initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(TEXTS + [NEXT], trainer)
  spec = json.loads(tokenizer.to_str())
  spec['added_tokens'] = [token for token in spec['added_tokens'] if not token['content'].startswith('<0x')]
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


KINDS = ['byte_level', 'metaspace', 'prepend']


@pytest.mark.parametrize('kind', KINDS)
def test_the_pieces_of_a_history_decode_to_its_text_for_every_kind_of_tokenizer(kind, tmp_path):
  tokenizer = _trained(kind)
  tokenizer.enable_truncation(3)
  tokenizer.enable_padding(length=20)
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  vocabulary = load_vocabulary(tmp_path)
  pieces = [FIRST, TEXTS[0], NEXT, TEXTS[5], NEXT, ' Title: 🙂.']
  assert vocabulary.decode([i for ids in vocabulary.encode_batch(pieces) for i in ids]) == ''.join(pieces)
  plain = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))  # the mutant: as it came
  plain.no_truncation()
  plain.no_padding()
  assert plain.decode([i for piece in pieces for i in plain.encode(piece).ids]) != ''.join(pieces)


def test_end_and_start_are_what_the_file_writes_around_a_text(tmp_path):
  tokenizer = _trained('byte_level')
  tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(
      single='<s> $A <|end|>', special_tokens=[('<s>', 1), ('<|end|>', 3)])])
  tokenizer.save(str(tmp_path / 't.json'))
  vocabulary = load_vocabulary(tmp_path / 't.json')
  assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id) == (1, 3, 0, 0)
  assert not {1, 3} & set(vocabulary.encode(' cup'))
  assert load_vocabulary(tmp_path / 't.json', bos_token='').bos_id is None


def test_the_end_token_can_be_named_and_is_remembered(tmp_path):
  _trained('byte_level').save(str(tmp_path / 'tokenizer.json'))
  assert load_vocabulary(tmp_path).eos_id == 2  # '</s>', a usual name
  named = load_vocabulary(tmp_path, eos_token='<|end|>', bos_token='<s>')
  assert (named.eos_id, named.bos_id) == (3, 1)
  assert named != load_vocabulary(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': {'content': '<|end|>'}}))
  assert load_vocabulary(tmp_path).eos_id == 3
  named.save(tmp_path / 'elsewhere' / 'vocabulary.json')
  again = load_vocabulary(tmp_path / 'elsewhere' / 'vocabulary.json')
  assert again == named and (again.eos_id, again.bos_id) == (3, 1)


@pytest.mark.parametrize('name, ids, expected', [('config.json', 3, 3), ('generation_config.json', [3, 2], 3),
                                                 ('config.json', None, 2), ('config.json', 999, 2)])
def test_the_models_own_files_name_the_end_token_by_its_id(tmp_path, name, ids, expected):
  _trained('byte_level').save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / name).write_text(json.dumps({'eos_token_id': ids}))
  assert load_vocabulary(tmp_path).eos_id == expected
  (tmp_path / name).write_text('[3]')  # no such file of a model
  assert load_vocabulary(tmp_path).eos_id == 2


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('model_type', [None, 'llama', 'gemma', 'gemma2', 'gemma3_text', 'qwen3'])
def test_transformers_reads_what_is_written_for_it(kind, model_type, tmp_path):
  _trained(kind).save(str(tmp_path / 'tokenizer.json'))
  ours = load_vocabulary(tmp_path, bos_token='<s>' if kind == 'prepend' else None, eos_token='<|end|>')
  ours.write_huggingface(tmp_path / 'out')
  if model_type:
    (tmp_path / 'out' / 'config.json').write_text(json.dumps({'model_type': model_type}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  bos = [] if ours.bos_id is None else [ours.bos_id]
  for text in [*TEXTS, 'Go , don\'t .  Blue\n cup  ', '']:
    assert theirs(text).input_ids == bos + ours.encode(text)
    assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
  assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, ours.bos_id)
  assert theirs.pad_token_id in {ours.pad_id, ours.eos_id}
  again = load_vocabulary(tmp_path / 'out')
  assert again == ours


def test_a_vocabulary_trained_here_is_written_for_transformers(tmp_path):
  VOCABULARY.write_huggingface(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs(TEXTS).input_ids == VOCABULARY.encode_batch(TEXTS)
  assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ('</s>', '<pad>', None)
  assert load_vocabulary(tmp_path) == VOCABULARY


def test_a_token_is_told_as_text():
  assert [VOCABULARY.token(i) for i in VOCABULARY.encode(' Title: Blue')] == [' Title:', ' Blue']
  assert VOCABULARY.token(VOCABULARY.eos_id) == '</s>'
  assert VOCABULARY.token(VOCABULARY.encode('ÿ')[0]) == '\N{REPLACEMENT CHARACTER}'  # half a letter


def test_one_token_may_start_and_end(tmp_path):
  _trained('byte_level').save(str(tmp_path / 't.json'))
  vocabulary = load_vocabulary(tmp_path / 't.json', eos_token='<|end|>', bos_token='<|end|>')
  assert vocabulary.bos_id == vocabulary.eos_id == 3


@pytest.mark.parametrize('content, message', [
    (None, 'cannot be read .*No such file'), ('{"a":', 'not a tokenizer.json'), ('{}', 'not a tokenizer.json'),
    ('[1]', 'not a tokenizer.json'), ('\udcff', 'not a tokenizer.json')])
def test_what_is_no_vocabulary_is_named(tmp_path, content, message):
  path = tmp_path / 'v.json'
  if content is not None:
    path.write_text(content, encoding='utf-8', errors='surrogateescape')
  with pytest.raises(UserError, match=f'v.json: .*{message}'):
    load_vocabulary(path)


def test_an_unknown_end_token_is_named(tmp_path):
  _trained('byte_level').save(str(tmp_path / 't.json'))
  with pytest.raises(UserError, match=r"t.json: has no token '<eot>'"):
    load_vocabulary(tmp_path / 't.json', eos_token='<eot>')
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.save(str(tmp_path / 'bare.json'))
  with pytest.raises(UserError, match='bare.json: which token ends a text is not known'):
    load_vocabulary(tmp_path / 'bare.json')


@pytest.mark.parametrize('name', ['scientific2018', 'games2018', 'office2014'])
def test_round_trip_on_real_items(real_data, name):
  with gzip.open(real_data / 'histories' / name / 'items.jsonl.gz', 'rt', encoding='utf-8') as file:
    items = [json.loads(line) for line in itertools.islice(file, 1500)]
  real = [' ' + TEMPLATE.item_text(item) for item in items]
  vocabulary = train_vocabulary(real, size=2000, phrases=PHRASES)
  assert vocabulary.vocab_size == 2000
  ids = vocabulary.encode_batch(real)
  assert [vocabulary.decode(tokens) for tokens in ids] == real
  history = text_pair([text[1:] for text in real[:50]])[0]
  assert vocabulary.decode(vocabulary.encode(history)) == history
