"""An index saved, grown or changed is the index built anew; one that does not fit or is not whole is refused in one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError
from calrec_jax.ranking import index as module
from calrec_jax.ranking.bm25 import Bm25Options
from calrec_jax.ranking.index import build_index, check_fits, load_index, read_catalogue
from calrec_jax.ranking.rankers import RANKERS
from calrec_jax.text.templates import ItemTemplate

NEW = 4  # items that the last ones are taken for


def part(catalogue, numbers):
  ids, items = catalogue
  return [ids[number] for number in numbers], [items[number] for number in numbers]


def same(actual, wanted, *, atol=0.0):
  """That two indexes are one, v_T up to `atol`."""
  as_stored = lambda value: json.loads(json.dumps(value))
  assert as_stored(actual.description) == as_stored(wanted.description) and actual.catalogue == wanted.catalogue
  assert list(actual.items) == list(wanted.items)
  for name, value in dataclasses.asdict(wanted.trie).items():
    np.testing.assert_array_equal(getattr(actual.trie, name), value)
  texts = ['Title: games c0. Category: red.', 'books puzzle $1']
  np.testing.assert_array_equal(actual.bm25.scores(texts), wanted.bm25.scores(texts))
  np.testing.assert_allclose(actual.texts_TD, wanted.texts_TD, rtol=0, atol=atol)
  np.testing.assert_array_equal(actual.tokens.tokens, wanted.tokens.tokens)


def same_rankings(actual, wanted, atol=1e-5):
  for mine, theirs in zip(actual, wanted, strict=True):
    for name in RANKERS:
      np.testing.assert_array_equal(mine[name].items, theirs[name].items, err_msg=name)
      np.testing.assert_allclose(mine[name].scores, theirs[name].scores, rtol=1e-5, atol=atol)


@pytest.fixture
def work(monkeypatch):
  """What building tokenizes and embeds: numbers of texts."""
  counts = {'item_tokens': [], 'embed_texts': []}
  def counting(name, texts_of, function):
    def counted(*args, **kwargs):
      counts[name].append(len(texts_of(args)))
      return function(*args, **kwargs)
    monkeypatch.setattr(module, name, counted)
  counting('item_tokens', lambda args: args[0], module.item_tokens)
  counting('embed_texts', lambda args: args[2], module.embed_texts)
  return counts


def test_saved_and_loaded_is_the_same(index, rank, tmp_path):
  index.save(tmp_path / 'index')
  assert module.is_index(tmp_path / 'index') and not module.is_index(tmp_path)
  assert {path.name for path in (tmp_path / 'index').iterdir()} == {
      'index.json', 'items.jsonl.gz', 'bm25.npz', 'trie.npz', 'texts.npy'}
  loaded = load_index(tmp_path / 'index')
  same(loaded, index)
  same_rankings(rank(loaded), rank(index), atol=0)


def test_grown_is_built_anew_and_reads_only_what_is_new(catalogue, index, loaded, rank, work, tmp_path):
  old = build_index(*part(catalogue, range(len(catalogue[0]) - NEW)), loaded)
  old.save(tmp_path / 'old')
  for each in work.values():
    each.clear()
  grown = build_index(*catalogue, loaded, old=load_index(tmp_path / 'old'))
  n_new = index.trie.n_texts - old.trie.n_texts
  assert work == {'item_tokens': [n_new], 'embed_texts': [n_new]} and 0 < n_new < NEW  # two have one text
  same(grown, index, atol=1e-6)
  same_rankings(rank(grown), rank(index))


def test_it_fails_where_the_old_embeddings_are_those_of_other_texts(catalogue, index, loaded):
  old = dataclasses.replace(index, texts_TD=np.roll(index.texts_TD, 1, axis=0))
  with pytest.raises(AssertionError):
    same(build_index(*catalogue, loaded, old=old), index, atol=1e-6)


def test_items_that_are_gone_changed_or_moved(catalogue, index, loaded, work):
  ids, items = part(catalogue, [*range(30, 2, -2), 35, 1])
  items[0] = {**items[0], 'price': '$77'}
  changed = build_index(ids, items, loaded, old=index)
  assert work == {'item_tokens': [1], 'embed_texts': [1]}
  same(changed, build_index(ids, items, loaded), atol=1e-6)


def test_nothing_new_is_no_work(catalogue, index, loaded, work):
  same(build_index(*catalogue, loaded, old=index), index)
  assert work == {'item_tokens': [0], 'embed_texts': [0]}


def test_an_old_index_may_lack_embeddings_or_have_another_bm25(catalogue, index, loaded):
  few = part(catalogue, range(6))
  old = build_index(*few, loaded, bm25=Bm25Options(k1=0.9), embed=False)
  assert old.texts_TD is None
  with pytest.raises(ValueError, match='without embeddings'):
    _ = old.dense
  same(build_index(*few, loaded, old=old), build_index(*few, loaded), atol=1e-6)


def test_without_embeddings_it_is_saved_and_loaded_too(catalogue, loaded, tmp_path):
  build_index(*part(catalogue, range(6)), loaded, embed=False).save(tmp_path / 'index')
  assert load_index(tmp_path / 'index').texts_TD is None and not (tmp_path / 'index/texts.npy').exists()


def test_fields_that_are_left_out_are_unknown(loaded):
  index = build_index(['a'], [{'title': 'only'}], loaded, embed=False)
  assert index.items == [{'title': 'only', 'category': '', 'brand': '', 'price': ''}]
  assert index.catalogue.texts == ['Title: only. Category: Unknown. Brand: Unknown. Price: Unknown.']


# Bad input.


def one_line(raised):
  assert '\n' not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(('name', 'value', 'told'), [
    ('vocabulary', 'x', 'another vocabulary'), ('weights', 'x', 'another weights'), ('max_item_tokens', 5, 'most tokens'),
    ('template', dataclasses.asdict(ItemTemplate(fields=('title',))), 'another template')])
def test_an_index_of_something_else_is_refused(catalogue, index, loaded, name, value, told):
  check_fits(index, loaded)
  other = dataclasses.replace(index, description={**index.description, name: value})
  for use in (lambda: check_fits(other, loaded), lambda: build_index(*catalogue, loaded, old=other)):
    with pytest.raises(UserError, match=f'{told}.*build it anew') as raised:
      use()
    one_line(raised)


@pytest.fixture(scope='module')
def folder(index, tmp_path_factory):
  folder = tmp_path_factory.mktemp('index') / 'index'
  index.save(folder)
  return folder


FILES = ('index.json', 'items.jsonl.gz', 'bm25.npz', 'trie.npz', 'texts.npy')


def cut(path):
  path.write_bytes(path.read_bytes()[:-40])


def flipped(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


def described(**changes):
  return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = [
    *((name, lambda path: path.unlink(), name) for name in FILES), *((name, cut, None) for name in FILES),
    *((name, lambda path: path.write_bytes(b''), None) for name in FILES),
    *((name, flipped, None) for name in ('items.jsonl.gz', 'bm25.npz', 'trie.npz')),
    ('index.json', lambda path: path.write_text('[]'), 'not a whole index'),
    ('index.json', described(format=99), 'of format 99, this version reads 1'),
    ('index.json', described(items='x'), 'not of one catalogue'),
    ('index.json', described(template={'fields': ['colour']}), 'colour'),
    ('items.jsonl.gz', lambda path: json_lines.write(path, [{'item_id': 'a', 'title': 'other'}]), 'not of one catalogue'),
    ('texts.npy', lambda path: np.save(path, np.zeros((3, 32), np.float32)), 'not of one catalogue'),
    ('bm25.npz', lambda path: shutil.copy(path.with_name('trie.npz'), path), 'bm25.npz'),
    ('trie.npz', lambda path: shutil.copy(path.with_name('bm25.npz'), path), 'not a whole index')]


@pytest.mark.parametrize(('name', 'damage', 'told'), DAMAGE)
def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path, name, damage, told):
  copy = shutil.copytree(folder, tmp_path / 'index')
  damage(copy / name)
  with pytest.raises(UserError, match=told) as raised:
    load_index(copy)
  one_line(raised)
  assert str(tmp_path) in str(raised.value) or told == 'colour'


def test_an_index_is_not_written_over_another(index, folder):
  before = (folder / 'index.json').read_bytes()
  with pytest.raises(UserError, match='in use'):
    index.save(folder)
  assert (folder / 'index.json').read_bytes() == before and len(list(folder.parent.iterdir())) == 1


def test_an_empty_catalogue_is_refused(loaded, tmp_path):
  with pytest.raises(UserError, match='catalogue is empty'):
    build_index([], [], loaded)
  (tmp_path / 'items.jsonl').write_text('\n\n')
  with pytest.raises(UserError, match='items.jsonl: lists no item'):
    read_catalogue(tmp_path / 'items.jsonl')


@pytest.mark.parametrize(('line', 'told'), [
    ('{"item_id": ', 'not JSON'), ('[1]', 'a JSON list'), ('{"title": "x"}', '"item_id" is None'),
    ('{"item_id": "a"}', 'listed a second time')])
def test_a_broken_line_of_a_catalogue_is_named(tmp_path, line, told):
  path = tmp_path / 'items.jsonl'
  path.write_text(f'{{"item_id": "a", "title": "t"}}\n{line}\n')
  with pytest.raises(UserError, match=f'items.jsonl: line 2: .*{told}') as raised:
    read_catalogue(path)
  assert 'max_bad_lines' not in str(raised.value)  # no option of the verbs that read one


def test_a_catalogue_is_a_file_a_histories_folder_or_an_index(tiny_store, folder, catalogue):
  assert read_catalogue(folder) == catalogue
  assert read_catalogue(tiny_store / 'data/books') == read_catalogue(tiny_store / 'data/books/items.jsonl.gz')
  with pytest.raises(UserError, match='nowhere: no such file'):
    read_catalogue(folder / 'nowhere')
  with pytest.raises(UserError, match='exactly one'):
    read_catalogue(tiny_store)


def test_a_model_that_has_diverged_is_named(catalogue, loaded):
  broken = dataclasses.replace(loaded, params=jax.tree.map(lambda x: x * np.nan, loaded.params))
  with pytest.raises(UserError, match='not finite'):
    build_index(*part(catalogue, range(3)), broken)
