"""Candidates are read back as they were written; what is wrong with a line is named."""

import json

import numpy as np
import pytest

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError
from calrec_jax.ranking.candidates import candidate_files, read_candidates

NUMBERS = {'a': 0, 'b': 1, 'c': 2}
GOOD = {'user_id': 'ann', 'item_ids': ['c', 'a'], 'scores': [0.5, 0.5]}


def test_files_are_found_by_ranker(tmp_path):
  for name in ('candidates-dense.jsonl.gz', 'candidates-bm25.jsonl.gz', 'generations.jsonl.gz', 'candidates-x.txt'):
    (tmp_path / name).write_bytes(b'')
  assert list(candidate_files(tmp_path).items()) == [
      ('bm25', tmp_path / 'candidates-bm25.jsonl.gz'), ('dense', tmp_path / 'candidates-dense.jsonl.gz')]
  assert candidate_files(tmp_path / 'nowhere') == {}


def test_good_lines(tmp_path):
  json_lines.write(tmp_path / 'x.jsonl.gz', [GOOD, {'user_id': 'bob', 'item_ids': [], 'scores': []}])
  found = read_candidates(tmp_path / 'x.jsonl.gz', NUMBERS)
  assert list(found) == ['ann', 'bob'] and not len(found['bob'].items)
  assert found['ann'].items.tolist() == [2, 0] and found['ann'].items.dtype == np.int64
  assert found['ann'].scores.tolist() == [0.5, 0.5] and found['ann'].scores.dtype == np.float64


BAD = {
  '{"user_id": "bob"': 'line 2: ',
  '[1, 2]': 'line 2: ',
  '{"user_id": "bob", "item_ids": ["a"]}': "'scores' is missing",
  '{"item_ids": [], "scores": []}': "'user_id' is missing",
  '{"user_id": ["bob"], "item_ids": [], "scores": []}': 'unhashable',
  '{"user_id": "bob", "item_ids": ["z"], "scores": [1]}': "item 'z' is not in the data set",
  '{"user_id": "bob", "item_ids": [0], "scores": [1]}': 'item 0 is not in the data set',
  '{"user_id": "bob", "item_ids": ["a"], "scores": [1, 0]}': 'do not fit',
  '{"user_id": "bob", "item_ids": ["a", "a"], "scores": [1, 0]}': 'comes twice',
  '{"user_id": "ann", "item_ids": [], "scores": []}': 'comes twice',
  '{"user_id": "bob", "item_ids": ["a"], "scores": [NaN]}': 'do not fit',
  '{"user_id": "bob", "item_ids": ["a"], "scores": ["x"]}': 'real number',
  '{"user_id": "bob", "item_ids": ["a"], "scores": [1' + '0' * 400 + ']}': 'too large',
  '{"user_id": "bob", "item_ids": ["a", "b"], "scores": [1, 2]}': 'the scores do not fall',
}


@pytest.mark.parametrize(('line', 'told'), BAD.items())
def test_a_bad_line_is_named_by_its_number(tmp_path, line, told):
  path = tmp_path / 'candidates-dense.jsonl'
  path.write_text(json.dumps(GOOD) + '\n' + line + '\n')
  with pytest.raises(UserError, match=f'candidates-dense.jsonl: line 2: .*{told.removeprefix("line 2: ")}') as raised:
    read_candidates(path, NUMBERS)
  assert 'make the file anew' in str(raised.value) and '\n' not in str(raised.value)


def test_a_file_that_was_cut_is_named(tmp_path):
  path = tmp_path / 'candidates-dense.jsonl.gz'
  json_lines.write(path, [GOOD])
  path.write_bytes(path.read_bytes()[:-6])
  with pytest.raises(UserError, match='candidates-dense.jsonl.gz: is truncated'):
    read_candidates(path, NUMBERS)
