"""The item token table: the tokens of every history of a data set, by way of the table and without it.

Ours tokenizes each item once, writes the table, maps it, and joins each history's tokens from it. The peer is the pipeline that
tokenizes on the fly: it encodes each history's text, one by one, with the same tokenizer. The peer and the joining are measured
on a sample of histories and scaled to all of them; the table is built in full. Titles are those of a generated store (or of
`--data`), with words exchanged between them and model numbers added.

The ratio is the peer's time over ours, for one pass over the data. It grows with the number of purchases that an item has: 15
is that of Amazon 2018. `ratio_per_text` is how much faster the table encodes a text than the peer does. Of memory it tells by
how much a process's peak grows, as a share of the table's size (by Linux' /proc): `building`, `mapping`, and `unpacking`, which
reads a table whole from a compressed file.

  python benchmarks/item_table_speed.py [--items 1000000] [--data FOLDER] [--vocabulary FILE] [--quick]

Some minutes for a million items on two CPU cores; `--quick` takes 20,000. Prints one JSON object as its last line.
"""

import argparse
import json
import pathlib
import re
import tempfile
import time
import types

import numpy as np

from calrec_jax.data import amazon, histories, synthetic
from calrec_jax.text.corpus import spread
from calrec_jax.text.item_tokens import ItemTokens, load_item_tokens, prompt_tokens, user_tokens
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate
from calrec_jax.text.vocabularies import TokenizerVocabulary, load_vocabulary, template_phrases, train_vocabulary

TEMPLATE = ItemTemplate()
LENGTH = 9  # events of a history


def status_bytes(name: str) -> int:
  """VmRSS or VmHWM, what of this process is in memory, now or at most."""
  return int(re.search(rf'{name}:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1]) * 1024


def measured(call) -> tuple[float, int, object]:
  """(seconds, bytes by which the process grew meanwhile, the result)."""
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
  before, begun = status_bytes('VmRSS'), time.perf_counter()
  result = call()
  return time.perf_counter() - begun, status_bytes('VmHWM') - before, result


def generated_items(folder: pathlib.Path) -> list[dict[str, str]]:
  """The items of a generated store, prepared."""
  store = synthetic.synthesize(folder / 'store', users=400, items=500, categories=4, progress=False)
  items = []
  for category in store['categories']:
    amazon.prepare_dumps([folder / 'store' / category['reviews']], [folder / 'store' / category['meta']], name=category['name'],
                         out=folder / category['name'], min_count=0, progress=False)
    items += histories.load(folder / category['name']).items
  return items


def altered(items: list[dict[str, str]], n_items: int, rng: np.random.Generator) -> list[dict[str, str]]:
  """So many items: each one's title has a word of another title in place of one of its own, and a model number."""
  words = [item['title'].split() or ['Item'] for item in items]
  made = []
  for own, other, number in zip(*rng.integers(len(items), size=(2, n_items)), rng.integers(10**6, size=n_items), strict=True):
    title = list(words[own])
    title[number % len(title)] = words[other][number % len(words[other])]
    made.append(dict(items[own], title=f'{" ".join(title)} {"ABCDEFGH"[number % 8]}{number}'))
  return made


def encode_one_by_one(items: list[dict[str, str]], events_UL: np.ndarray, vocabulary: TokenizerVocabulary) -> tuple[float, int]:
  """The peer's (seconds, tokens)."""
  begun, n_tokens = time.perf_counter(), 0
  for events in events_UL.tolist():
    texts = (TEMPLATE.item_text(items[item]) for item in events)
    n_tokens += len(vocabulary.encode(''.join(f'{NEXT if place else FIRST} {text}' for place, text in enumerate(texts))))
  return time.perf_counter() - begun, n_tokens


def join(table: ItemTokens, events_UL: np.ndarray, vocabulary: TokenizerVocabulary) -> tuple[float, float]:
  """Seconds that the bank takes, and the histories' tokens from it: a gather, as `text/rows.py` does it."""
  begun, prompts = time.perf_counter(), prompt_tokens(vocabulary)
  bank = np.concatenate([table.tokens, prompts.next, prompts.first])
  bank_seconds = time.perf_counter() - begun  # once for all histories
  begun, lengths_I, n_tokens = time.perf_counter(), np.diff(table.offsets), len(table.tokens)
  first, following = (n_tokens + len(prompts.next), len(prompts.first)), (n_tokens, len(prompts.next))
  for start in range(0, len(events_UL), 256):
    events_BL = events_UL[start:start + 256]
    places = np.broadcast_to(np.arange(events_BL.shape[1]), events_BL.shape)
    prompt_starts, prompt_lengths = (np.where(places == 0, *pair) for pair in zip(first, following, strict=True))
    starts = np.stack([prompt_starts, table.offsets[events_BL]], axis=-1).reshape(-1)
    lengths = np.stack([prompt_lengths, lengths_I[events_BL]], axis=-1).reshape(-1)
    joined = bank[spread(starts, lengths)]
  expected = user_tokens([table.item(item) for item in events_UL[-1]], prompts)[:-len(prompts.next)]
  np.testing.assert_array_equal(joined[-len(expected):], expected)
  return bank_seconds, time.perf_counter() - begun


def unpacked(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """The arrays of a compressed file."""
  with np.load(path) as stored:
    return stored['tokens'], stored['offsets']


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--items', type=int, default=1_000_000)
  parser.add_argument('--purchases', type=int, default=15, help='events an item has (default %(default)s)')
  parser.add_argument('--data', help='histories folder whose titles are altered (default: those of a generated store)')
  parser.add_argument('--vocabulary', help='(default: one of 4,096 tokens trained on the titles)')
  parser.add_argument('--quick', action='store_true', help='20,000 items')
  options = parser.parse_args()
  n_items = 20_000 if options.quick else options.items
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as work:
    work = pathlib.Path(work)
    originals = histories.load(options.data).items if options.data else generated_items(work)
    vocabulary = load_vocabulary(options.vocabulary) if options.vocabulary else train_vocabulary(
        [TEMPLATE.item_text(item) for item in originals], size=4096, phrases=template_phrases(TEMPLATE))
    items = altered(originals, n_items, rng)
    n_histories = n_items * options.purchases // LENGTH
    sample_UL = rng.integers(n_items, size=(min(n_histories, max(n_items // 100, 1000)), LENGTH))
    scale = n_histories / len(sample_UL)
    peer_seconds = encode_one_by_one(items, sample_UL[::2], vocabulary)[0]  # half before and half after: the machine changes
    data = types.SimpleNamespace(fingerprint='benchmark', items=items, name='benchmark')
    load = lambda: load_item_tokens(work, data, TEMPLATE, vocabulary)
    table_seconds, building, table = measured(load)
    again_seconds, mapping, _ = measured(load)
    peer_seconds += encode_one_by_one(items, sample_UL[1::2], vocabulary)[0]
    bank_seconds, join_seconds = join(table, sample_UL, vocabulary)
    np.savez_compressed(work / 'whole.npz', tokens=table.tokens, offsets=table.offsets)
    _, unpacking, _ = measured(lambda: unpacked(work / 'whole.npz'))
  size = table.tokens.nbytes + table.offsets.nbytes
  ours, peer = table_seconds + bank_seconds + join_seconds * scale, peer_seconds * scale
  per_text = peer_seconds / sample_UL.size / (table_seconds / n_items)
  print(f'{n_items:,} items of {len(table.tokens) / n_items:.1f} tokens, {n_histories:,} histories of {LENGTH} items '
        f'({options.purchases} purchases an item), {len(sample_UL):,} of them measured')
  print(f'table {table_seconds:.1f} s, histories from it {bank_seconds + join_seconds * scale:.1f} s; the peer {peer:.1f} s; '
        f'the table again {again_seconds / table_seconds:.2%} of the first time')
  print(json.dumps({'name': 'item_table_speed', 'peer': 'each history encoded by itself with the same tokenizer',
                    'ratio': round(peer / ours, 1), 'items': n_items, 'purchases_per_item': options.purchases,
                    'ratio_per_text': round(per_text, 2), 'building': round(building / size, 2),
                    'mapping': round(mapping / size, 2), 'unpacking': round(unpacking / size, 2)}))


if __name__ == '__main__':
  main()
