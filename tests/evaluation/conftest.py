"""A store that is small enough to count by hand."""

import gzip
import json

import numpy as np
import pytest

from calrec_jax.data.histories import Histories

TITLES = {'g1': 'Strong Glue', 'g2': 'Wood Glue', 'h1': 'Garden Hose', 'h2': 'Steel Hose',
          't1': 'Duct Tape', 't2': 'Duct Tape'}


def make_histories(sequences: dict[str, list[str]], titles: dict[str, str] = TITLES) -> Histories:
  """A data set named `shop` with these histories; items have a title only."""
  number_of = {item_id: number for number, item_id in enumerate(titles)}
  return Histories(
    name='shop',
    user_ids=list(sequences),
    item_ids=list(titles),
    items=[{'title': title, 'category': '', 'brand': '', 'price': ''} for title in titles.values()],
    offsets=np.cumsum([0, *map(len, sequences.values())]).astype(np.int64),
    events=np.array([number_of[item_id] for items in sequences.values() for item_id in items], np.int32))


@pytest.fixture
def shop() -> Histories:
  return make_histories({
    'ann': ['g1', 'h1', 'g1', 'h2'],  # train g1 h1, validation g1, test h2
    'bob': ['g1', 'h1', 'h2', 't1', 'h1'],  # train g1 h1 h2, validation t1, test h1
    'cat': ['g2', 'g1', 'h2', 't1', 't2'],  # train g2 g1 h2, validation t1, test t2
  })


@pytest.fixture
def write_lines(tmp_path):
  """A function that writes objects (or ready lines) as a gzipped JSON lines file and returns its path."""
  def write(lines, name='generations.jsonl.gz'):
    path = tmp_path / name
    with gzip.open(path, 'wt', encoding='utf-8') as file:
      for line in lines:
        file.write((line if isinstance(line, str) else json.dumps(line)) + '\n')
    return path

  return write
