"""A shop of a few users: its histories folder, and the same texts as generated for each of them."""

import gzip
import json
import pathlib
from collections.abc import Mapping, Sequence


def write_lines(path: pathlib.Path, rows: Sequence[Mapping]) -> None:
  """One JSON object a line."""
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def write_shop(place: pathlib.Path, users: Mapping[str, Sequence[int]], items: Sequence[Mapping[str, str]],
               texts: Sequence[str], logprobs: Sequence[float]) -> None:
  """Writes `place`/data and `place`/generations. Item number n is called `in`; what `items` does not say of it is unknown."""
  data, generations = place / 'data', place / 'generations'
  data.mkdir()
  write_lines(data / 'sequences.jsonl', [{'user_id': user, 'item_ids': [f'i{item}' for item in bought]}
                                         for user, bought in users.items()])
  unknown = dict.fromkeys(('title', 'category', 'brand', 'price'), '')
  write_lines(data / 'items.jsonl', [{'item_id': f'i{number}', **unknown, **item} for number, item in enumerate(items)])
  generations.mkdir()
  with gzip.open(generations / 'generations.jsonl.gz', 'wt') as file:
    for user in users:
      file.write(json.dumps({'user_id': user, 'texts': list(texts), 'logprobs': list(logprobs)}) + '\n')
