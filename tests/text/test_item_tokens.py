"""The pieces' tokens are a history's tokens; the table is computed once and never stale."""

import concurrent.futures
import dataclasses
import errno
import io
import itertools
import mmap
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calrec_jax.data.histories import Histories
from calrec_jax.text import item_tokens as item_tokens_lib
from calrec_jax.text.item_tokens import (
    count_cut_differences,
    item_tokens,
    load_item_tokens,
    prompt_tokens,
    user_tokens,
)
from calrec_jax.text.templates import FIELDS, FIRST, NEXT, ItemTemplate, text_pair
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

TEMPLATE = ItemTemplate()
ITEMS = [{'title': f'{size} cup {n}', 'category': 'Kitchen', 'brand': '', 'price': '$5.99'}
         for n in range(3) for size in ('small', 'größer')]
TEXTS = [TEMPLATE.item_text(item) for item in ITEMS]
VOCABULARY = train_vocabulary([' ' + text for text in TEXTS], size=330, phrases=template_phrases(TEMPLATE))
BARE = train_vocabulary([' ' + text for text in TEXTS], size=330, phrases=[])  # prompts are cut into words
HISTORIES = Histories('cups', ['u'], list('abcdef'), ITEMS, np.array([0, 6]), np.arange(6, dtype=np.int32), None)

values = st.text(st.characters(exclude_categories=['Cs']), max_size=12)
items = st.fixed_dictionaries({field: values for field in FIELDS})


def test_a_table_holds_each_piece():
  table = item_tokens(TEXTS, VOCABULARY)
  assert (table.tokens.dtype, table.offsets.dtype) == (np.int32, np.int64)
  for index, text in enumerate(TEXTS):
    np.testing.assert_array_equal(table.item(index), VOCABULARY.encode(' ' + text))


def test_batches_do_not_show(monkeypatch):
  whole = item_tokens(TEXTS, VOCABULARY)
  monkeypatch.setattr(item_tokens_lib, '_BATCH', 4)
  check_same(item_tokens(TEXTS, VOCABULARY), whole)


def test_no_items():
  table = item_tokens([], VOCABULARY)
  assert table.tokens.shape == (0,) and table.offsets.tolist() == [0]


def test_prompts():
  prompts = prompt_tokens(BARE)
  assert BARE.decode(prompts.first) == FIRST and BARE.decode(prompts.next) == NEXT
  assert prompts.first.dtype == prompts.next.dtype == np.int32
  assert len(prompt_tokens(VOCABULARY).first) == len(prompt_tokens(VOCABULARY).next) == 1


@pytest.mark.parametrize('vocabulary', [VOCABULARY, BARE])
@given(history=st.lists(items, min_size=2, max_size=4))
def test_the_pieces_join_to_the_text_and_to_the_tokens_of_the_whole(vocabulary, history):
  texts = [TEMPLATE.item_text(item) for item in history]
  table = item_tokens(texts, vocabulary)
  *context, target = [table.item(i) for i in range(len(texts))]
  user = user_tokens(context, prompt_tokens(vocabulary))
  inputs, targets = text_pair(texts)
  assert vocabulary.decode(user) == inputs
  assert vocabulary.decode(target) == targets
  # No merge of byte-level BPE crosses a cut: a piece ends in '.', and the next one begins with white space.
  assert user.tolist() + target.tolist() == vocabulary.encode(inputs + targets)


def test_pieces_cut_before_the_space_would_not_be_the_whole_text():
  # The mutant: the space at the end of the prompt. ' Title:' is one token, ' ' and 'Title:' are not.
  texts = ['small cup.', 'small cup.']
  prompts = prompt_tokens(BARE)
  mutant = [*BARE.encode(FIRST + ' '), *BARE.encode(texts[0]), *prompts.next.tolist()]
  assert BARE.decode(mutant) == text_pair(texts)[0]
  assert mutant != BARE.encode(text_pair(texts)[0])


def test_cut_differences_are_counted():
  assert count_cut_differences(TEXTS, VOCABULARY) == 0
  assert count_cut_differences(TEXTS, BARE) == 0

  class Merging:  # merges a full stop and the line break after it, as some pretrained tokenizers do
    def encode(self, text):
      return [ord(c) for c in text.replace('.\n', '\0')]

    def encode_batch(self, texts):
      return [self.encode(text) for text in texts]

  assert count_cut_differences(TEXTS, Merging()) == len(TEXTS)


def _tables(folder):
  return sorted((folder / 'item_tokens').iterdir())


def _fail(*_):
  raise AssertionError('computed a second time')


def check_same(table, other):
  for a, b in zip(dataclasses.astuple(table), dataclasses.astuple(other), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


def test_the_table_is_kept_and_mapped(tmp_path, monkeypatch):
  first = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  check_same(first, item_tokens(TEXTS, VOCABULARY))
  [table] = _tables(tmp_path)
  assert {path.name for path in table.iterdir()} == {'tokens.npy', 'offsets.npy', 'checksums.json'}
  monkeypatch.setattr(item_tokens_lib, '_encoded', _fail)
  again = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  check_same(again, first)
  for array in (again.tokens, again.offsets):
    memory = array
    while isinstance(memory, np.ndarray):
      memory = memory.base
    assert isinstance(memory, mmap.mmap) and type(array) is np.ndarray
    with pytest.raises(ValueError, match='read-only'):
      array[0] = 7


@pytest.mark.parametrize('batch', [1, 4, 6, 7])
def test_a_table_written_batch_by_batch_has_the_bytes_of_one_written_at_once(tmp_path, monkeypatch, batch):
  load_item_tokens(tmp_path / 'whole', HISTORIES, TEMPLATE, VOCABULARY)
  monkeypatch.setattr(item_tokens_lib, '_BATCH', batch)
  load_item_tokens(tmp_path / 'parts', HISTORIES, TEMPLATE, VOCABULARY)
  [whole], [parts] = _tables(tmp_path / 'whole'), _tables(tmp_path / 'parts')
  assert whole.name == parts.name
  assert all((parts / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir())


def test_the_texts_are_made_as_they_are_needed(tmp_path, monkeypatch):
  alive, most = 0, 0

  class Text(str):
    def __new__(cls, text):
      nonlocal alive, most
      alive, most = alive + 1, max(most, alive + 1)
      return super().__new__(cls, text)

    def __del__(self):
      nonlocal alive
      alive -= 1

  monkeypatch.setattr(item_tokens_lib, '_BATCH', 10)
  monkeypatch.setattr(ItemTemplate, 'item_text', lambda self, item: Text(item['title']))
  many = dataclasses.replace(HISTORIES, items=[dict(ITEMS[0], title=f'cup {n}') for n in range(500)])
  assert len(load_item_tokens(tmp_path, many, TEMPLATE, VOCABULARY).offsets) == 501
  assert 0 < most <= 20


def test_the_header_has_room_for_any_number_of_tokens():
  lengths = set()
  for n_tokens in (0, 1, 10**6, 10**12, 2**63 - 1):
    file = io.BytesIO()
    item_tokens_lib._write_header(file, n_tokens)
    lengths.add(file.tell())
    file.seek(0)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((n_tokens,), False, np.dtype(np.int32))
  assert len(lengths) == 1


def test_an_old_table_is_left_alone(tmp_path):
  old = tmp_path / 'item_tokens' / 'abc.npz'
  old.parent.mkdir()
  old.write_bytes(b'old')
  load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  assert old.read_bytes() == b'old' and len(_tables(tmp_path)) == 2


@pytest.mark.parametrize('change', ['data', 'template', 'vocabulary'])
def test_another_input_gives_another_table(tmp_path, change):
  load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  changed = [dict(ITEMS[0], title='plate'), *ITEMS[1:]]
  histories = dataclasses.replace(HISTORIES, items=changed) if change == 'data' else HISTORIES
  template = ItemTemplate(fields=('title',)) if change == 'template' else TEMPLATE
  vocabulary = BARE if change == 'vocabulary' else VOCABULARY
  table = load_item_tokens(tmp_path, histories, template, vocabulary)
  assert vocabulary.decode(table.item(0)) == ' ' + template.item_text(histories.items[0])
  assert len(_tables(tmp_path)) == 2


@pytest.mark.parametrize('file', ['tokens.npy', 'offsets.npy', 'checksums.json'])
@pytest.mark.parametrize('damage', [lambda data: b'', lambda data: data[:40], lambda data: data[:-6], lambda data: data + b'x',
                                    lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
                                    lambda data: data[:20] + bytes(9) + data[29:], None])
def test_a_damaged_table_is_computed_anew(tmp_path, file, damage):
  first = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  [table] = _tables(tmp_path)
  good = (table / file).read_bytes()
  if damage is None:
    (table / file).unlink()
  else:
    (table / file).write_bytes(damage(good))
  again = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  check_same(again, item_tokens(TEXTS, VOCABULARY))
  assert _tables(tmp_path) == [table] and (table / file).read_bytes() == good
  assert len(first.offsets) == len(again.offsets)


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path, caplog):
  (tmp_path / 'item_tokens').write_text('a file in the way')
  table = load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  check_same(table, item_tokens(TEXTS, VOCABULARY))
  assert 'kept in memory' in caplog.text and 'cannot be written' in caplog.text


def test_a_full_disk_keeps_nothing(tmp_path, monkeypatch, caplog):
  def full(folder, texts, vocabulary):
    (folder / 'tokens.npy').write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(item_tokens_lib, '_write', full)
  check_same(load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY), item_tokens(TEXTS, VOCABULARY))
  assert _tables(tmp_path) == [] and 'No space left' in caplog.text


def test_nothing_half_written_stays_where_it_is_interrupted(tmp_path, monkeypatch):
  def interrupted(texts, vocabulary):
    yield from itertools.islice(whole(texts, vocabulary), 1)
    raise KeyboardInterrupt

  whole = item_tokens_lib._encoded
  with monkeypatch.context() as patch:
    patch.setattr(item_tokens_lib, '_encoded', interrupted)
    with pytest.raises(KeyboardInterrupt):
      load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  assert _tables(tmp_path) == []
  check_same(load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY), item_tokens(TEXTS, VOCABULARY))


@pytest.mark.parametrize('damaged', [False, True])
def test_several_that_begin_at_once_all_have_the_table(tmp_path, monkeypatch, damaged):
  if damaged:
    load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
    (_tables(tmp_path)[0] / 'tokens.npy').write_bytes(b'damaged')
  n, encoded = 4, item_tokens_lib._encoded
  gate = threading.Barrier(n)

  def together(texts, vocabulary):
    gate.wait(60)  # none has written when the last one begins
    return encoded(texts, vocabulary)

  expected = item_tokens(TEXTS, VOCABULARY)
  monkeypatch.setattr(item_tokens_lib, '_encoded', together)
  with concurrent.futures.ThreadPoolExecutor(n) as pool:
    tables = list(pool.map(lambda _: load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY), range(n)))
  for table in tables:
    check_same(table, expected)
  assert len(_tables(tmp_path)) == 1  # and no scratch folder
  monkeypatch.setattr(item_tokens_lib, '_encoded', _fail)
  check_same(load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY), expected)


def test_a_process_that_is_forked_afterwards_tokenizes_too_and_nothing_warns(tmp_path):
  VOCABULARY.save(tmp_path / 'vocabulary.json')
  code = """if True:
    import os, sys, tokenizers
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    texts = [f' cup {n}' for n in range(5000)]
    ids = lambda: [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    first = ids()
    child = os.fork()
    if not child:
      os._exit(0 if ids() == first else 3)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
  environment = {name: value for name, value in os.environ.items() if name != 'TOKENIZERS_PARALLELISM'}
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'vocabulary.json')], env=environment, timeout=60,
                        capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')


def test_of_many_items_a_log_tells_that_they_are_tokenized(tmp_path, monkeypatch, caplog):
  caplog.set_level('INFO')
  monkeypatch.setattr(item_tokens_lib, '_MANY', len(ITEMS))
  for _ in range(2):
    load_item_tokens(tmp_path, HISTORIES, TEMPLATE, VOCABULARY)
  assert [message for message in caplog.messages if 'okenize' in message] == [
      'Tokenizes the 6 items of cups, once for this vocabulary.']
