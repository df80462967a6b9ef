"""The index of a catalogue: what the rankers look up, made of the items' texts and one checkpoint. New items need nothing else.

A folder holds
  index.json      what it was made from: fingerprints of items, vocabulary and weights, the template, options
  items.jsonl.gz  the items, as in a histories folder
  bm25.npz        the BM25 index
  trie.npz        the trie of token sequences
  texts.npy       float32 [T, D], v_T of each text of the trie
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from calrec_jax import outputs, storage
from calrec_jax.data import histories, json_lines
from calrec_jax.errors import UserError
from calrec_jax.inference.embedding import embed_texts
from calrec_jax.inference.loading import Loaded
from calrec_jax.inference.trie import Trie, build_trie
from calrec_jax.ranking.bm25 import LUCENE, Bm25, Bm25Options
from calrec_jax.ranking.catalogue import Catalogue, indexed_texts
from calrec_jax.ranking.dense import DenseIndex
from calrec_jax.text.item_tokens import ItemTokens, item_tokens
from calrec_jax.text.templates import FIELDS, ItemTemplate

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Index:
  """A catalogue, indexed.

  Attributes:
    description: what it was made from, as in index.json.
    items: I; each maps 'title', 'category', 'brand', 'price' to text, '' if unknown.
    catalogue: their ids and texts.
    bm25: over the I texts.
    trie: of their token sequences; its texts are the T distinct ones.
    texts_TD: float32, v_T of each of these; None where it was left out.
  """

  description: dict
  items: Sequence[Mapping[str, str]]
  catalogue: Catalogue
  bm25: Bm25
  trie: Trie
  texts_TD: np.ndarray | None

  @functools.cached_property
  def dense(self) -> DenseIndex:
    """The search over v_T."""
    if self.texts_TD is None:
      raise ValueError('This index was built without embeddings.')
    return DenseIndex(self.texts_TD)

  @functools.cached_property
  def item_numbers(self) -> dict[str, int]:
    """Each item's number, by its id."""
    return {item_id: number for number, item_id in enumerate(self.catalogue.item_ids)}

  @functools.cached_property
  def tokens(self) -> ItemTokens:
    """Every item's tokens, cut as in training."""
    trie = self.trie
    lengths_I = trie.lengths_T[trie.texts_I]
    tokens_IL = trie.text_tokens(np.arange(trie.n_texts))[trie.texts_I]
    return ItemTokens(tokens_IL[np.arange(tokens_IL.shape[1])[None] < lengths_I[:, None]],
                      np.concatenate([[0], np.cumsum(lengths_I, dtype=np.int64)]))

  def save(self, out: str | os.PathLike) -> None:
    """Writes the folder, whole or not at all. Raises UserError if `out` is in use, or cannot be written."""
    with outputs.new_folder(out) as folder:
      rows = ({'item_id': item_id, **item} for item_id, item in zip(self.catalogue.item_ids, self.items, strict=True))
      json_lines.write(folder / 'items.jsonl.gz', rows)
      self.bm25.save(folder / 'bm25.npz')
      self.trie.save(folder / 'trie.npz')
      if self.texts_TD is not None:
        np.save(folder / 'texts.npy', self.texts_TD)
      outputs.write_json(folder / 'index.json', self.description)


def is_index(path: str | os.PathLike) -> bool:
  """Whether the folder is an index."""
  return storage.exists(storage.join(path, 'index.json'))


def load_index(folder: str | os.PathLike) -> Index:
  """Raises UserError where the folder is no index, or a file of it is damaged or missing."""
  folder = storage.local(folder)
  try:
    description = json.loads((folder / 'index.json').read_text(encoding='utf-8'))
    if description['format'] != FORMAT:
      raise UserError(f'{folder}: an index of format {description["format"]}, this version reads {FORMAT}; build it anew with '
                      '`calrec index`.')
    ids, items = read_catalogue(folder / 'items.jsonl.gz')
    catalogue = _catalogue(ids, items, ItemTemplate(**description['template']))
    texts = folder / 'texts.npy'
    index = Index(description, items, catalogue, Bm25.load(folder / 'bm25.npz'), Trie.load(folder / 'trie.npz'),
                  np.load(texts, mmap_mode='r') if texts.exists() or description['embedded'] else None)
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    file = f'{pathlib.Path(error.filename).name}: ' if isinstance(error, OSError) and error.filename else ''
    what = f'{file}{error.strerror}' if file else f'{type(error).__name__}: {str(error)[:120]}'
    raise UserError(f'{folder}: not a whole index ({what}); build it with `calrec index`.') from error
  texts_fit = index.texts_TD is None or (index.texts_TD.ndim == 2 and len(index.texts_TD) == index.trie.n_texts)
  if (_fingerprint(catalogue) != description['items'] or not texts_fit
      or len(index.bm25) != len(ids) or len(index.trie.texts_I) != len(ids)):
    raise UserError(f'{folder}: its files are not of one catalogue; build it anew with `calrec index`.')
  return index


def read_catalogue(path: str | os.PathLike) -> tuple[list[str], list[dict[str, str]]]:
  """(ids, fields) of the items of a file of items, or of a histories folder. Raises UserError for a broken or empty one."""
  path = storage.local(path)
  if path.is_dir():
    path = histories.find_file(path, 'items')
  numbers, items = histories.read_items(path, json_lines.BadLines(path, None))
  return list(numbers), items


def build_index(item_ids: Sequence[str], items: Sequence[Mapping[str, str]], loaded: Loaded, *, bm25: Bm25Options = LUCENE,
                old: Index | None = None, embed: bool = True) -> Index:
  """Indexes a catalogue.

  Args:
    item_ids: I ids.
    items: their fields; one that is left out is ''.
    loaded: the checkpoint; it brings template, vocabulary, and the most tokens of an item.
    bm25: which BM25.
    old: an index, from which is taken what does not change: an item's tokens and embedding where its text is in it.
    embed: whether to compute v_T, which takes the most time; `dense` needs it.

  Raises:
    UserError: no items, or one without tokens; `old` was made with another vocabulary, template or weights; embeddings that are
      not finite.
  """
  if not item_ids:
    raise UserError('The catalogue is empty; give at least one item.')
  items = [{field: item.get(field, '') for field in FIELDS} for item in items]
  most = loaded.lengths['targets']
  description = {
      'format': FORMAT, 'vocabulary': loaded.vocabulary.fingerprint, 'template': dataclasses.asdict(loaded.template),
      'max_item_tokens': most, 'weights': loaded.weights, 'bm25': dataclasses.asdict(bm25), 'embedded': embed}
  catalogue = _catalogue(item_ids, items, loaded.template)
  description['items'] = _fingerprint(catalogue)
  known = {}  # text to a text's number in the old trie
  if old is not None:
    check_fits(old, loaded)
    known = dict(zip(old.catalogue.texts, old.trie.texts_I.tolist(), strict=True))
  try:
    trie = build_trie(_tokens(catalogue.texts, known, old, loaded), max_item_tokens=most, eos_id=loaded.vocabulary.eos_id)
  except ValueError as error:
    raise UserError(f'The catalogue cannot be indexed: {error}') from error
  texts_TD = _embeddings(catalogue.texts, trie, known, old, loaded) if embed else None
  return Index(description, items, catalogue, _bm25(items, loaded.template, bm25, old), trie, texts_TD)


def check_fits(index: Index, loaded: Loaded) -> None:
  """Raises UserError unless the index was made with the checkpoint's vocabulary, template, item length and weights."""
  for name, found, expected in (
      ('vocabulary', index.description['vocabulary'], loaded.vocabulary.fingerprint),
      ('template', ItemTemplate(**index.description['template']), loaded.template),
      ('most tokens of an item', index.description['max_item_tokens'], loaded.lengths['targets']),
      ('weights', index.description['weights'], loaded.weights)):
    if found != expected:
      raise UserError(f'The index was made with another {name} than the checkpoint {loaded.found.model_dir} has ({found}, not '
                      f'{expected}); build it anew with `calrec index`.')


def _catalogue(item_ids: Sequence[str], items: Sequence[Mapping[str, str]], template: ItemTemplate) -> Catalogue:
  return Catalogue(item_ids, [template.item_text(item) for item in items])


def _fingerprint(catalogue: Catalogue) -> str:
  digest = hashlib.sha256()
  for item_id, text in zip(catalogue.item_ids, catalogue.texts, strict=True):
    digest.update(f'{len(item_id)} {item_id}{len(text)} {text}'.encode())
  return digest.hexdigest()


def _tokens(texts: Sequence[str], known: Mapping[str, int], old: Index | None, loaded: Loaded) -> ItemTokens:
  """The items' tokens: of those that the old index has from there."""
  new = [text for text in dict.fromkeys(texts) if text not in known]
  table = item_tokens(new, loaded.vocabulary)
  place = {text: number for number, text in enumerate(new)}
  lengths_of_old = np.zeros(0, np.int64) if old is None else old.trie.lengths_T
  longest = int(lengths_of_old.max(initial=0))
  old_tokens_TL = np.zeros((0, longest), np.int32) if old is None else old.trie.text_tokens(np.arange(old.trie.n_texts))
  pieces = [old_tokens_TL[known[text], :lengths_of_old[known[text]]] if text in known else table.item(place[text])
            for text in texts]
  return ItemTokens(np.concatenate(pieces), np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]))


def _embeddings(texts: Sequence[str], trie: Trie, known: Mapping[str, int], old: Index | None, loaded: Loaded) -> np.ndarray:
  """v_T of the trie's texts: of those that the old index has from there."""
  source_T = np.full(trie.n_texts, -1)
  if old is not None and old.texts_TD is not None:
    np.maximum.at(source_T, trie.texts_I, [known.get(text, -1) for text in texts])
  missing = np.flatnonzero(source_T < 0)
  tokens_ML = trie.text_tokens(missing)
  found_TD = np.zeros((trie.n_texts, loaded.decoder.config.embed_dim), np.float32)
  if len(missing) < trie.n_texts:
    kept = np.flatnonzero(source_T >= 0)
    found_TD[kept] = old.texts_TD[source_T[kept]]
  found_TD[missing] = embed_texts(
      loaded.decoder, loaded.by_layer, [row[:length] for row, length in zip(tokens_ML, trie.lengths_T[missing], strict=True)],
      bos_id=loaded.vocabulary.bos_id)
  if not np.isfinite(found_TD).all():
    raise UserError(f'{loaded.found.model_dir}: the model gives embeddings that are not finite; take another one.')
  return found_TD


def _bm25(items: Sequence[Mapping[str, str]], template: ItemTemplate, options: Bm25Options, old: Index | None) -> Bm25:
  if old is not None and old.bm25.options == options and items[:len(old.items)] == old.items:
    return old.bm25.with_items(indexed_texts(items[len(old.items):], template, options.fields))
  return Bm25(indexed_texts(items, template, options.fields), options)
