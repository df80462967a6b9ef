"""A data set without any leak, and ways to change one thing of it."""

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import Histories

DAY = 86400
WORDS = ('red', 'blue', 'garden', 'steel', 'wood', 'glue', 'hose', 'tape', 'lamp', 'desk', 'book', 'game', 'tea', 'cup', 'pot')


def shop(n_users: int = 120, n_items: int = 90, seed: int = 0, timed: bool = True, name: str = 'shop') -> Histories:
  """Users who buy at random, on random days, at times two things a day. Ids tell nothing."""
  rng = np.random.default_rng(seed)
  item_ids = [f'i{number:04}' for number in rng.permutation(10 * n_items)[:n_items]]
  items = [{'title': ' '.join(rng.choice(WORDS, 5, replace=False)), 'category': '', 'brand': f'maker {item}',
            'price': f'${item}'} for item in range(n_items)]
  rows, times = [], []
  for _ in range(n_users):
    length = rng.integers(5, 11)
    rows.append(rng.choice(n_items, length, replace=False))
    times.append(DAY * (rng.integers(2000) + np.cumsum(rng.integers(0, 4, length))))
  user_ids = [f'u{number:03}' for number in rng.permutation(n_users)]
  return from_rows(name, user_ids, item_ids, items, rows, times if timed else None)


def from_rows(name: str, user_ids: Sequence[str], item_ids: Sequence[str], items: Sequence[dict], rows: Sequence[np.ndarray],
              times: Sequence[np.ndarray] | None) -> Histories:
  return Histories(name, list(user_ids), list(item_ids), list(items), np.cumsum([0, *map(len, rows)]).astype(np.int64),
                   np.concatenate(rows).astype(np.int32), None if times is None else np.concatenate(times).astype(np.int64))


def split_rows(data: Histories) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
  """Each user's events, and times, as arrays of their own."""
  cut = lambda values: None if values is None else [each.copy() for each in np.split(values, data.offsets[1:-1])]
  return cut(data.events), cut(data.timestamps)


def with_rows(data: Histories, rows: Sequence[np.ndarray], times: Sequence[np.ndarray] | None, **changes) -> Histories:
  fresh = from_rows(data.name, data.user_ids, data.item_ids, data.items, rows, times)
  return dataclasses.replace(fresh, **changes)


def changed(data: Histories, change: Callable[[list[np.ndarray], list[np.ndarray] | None], None], **changes) -> Histories:
  """The data set after `change` has worked on its rows and times."""
  rows, times = split_rows(data)
  change(rows, times)
  return with_rows(data, rows, times, **changes)


def store(data: Histories, folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir(parents=True)
  histories_lib.write(folder, data, {})
  return folder


def read_lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def write_lines(path: pathlib.Path, rows: Sequence[dict | str]) -> None:
  text = ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)
  path.write_bytes(gzip.compress(text.encode(), mtime=0))
