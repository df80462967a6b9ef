"""Generations are read as written; what is wrong with them is named by line."""

import re

import pytest

from calrec_jax.errors import UserError
from calrec_jax.evaluation.generations import Generation, read_generations, shares

GOOD = {'user_id': 'ann', 'texts': ['Title: Glue.', ''], 'logprobs': [-1.5, -2], 'finished': [True, False]}


def test_good_lines(write_lines):
  path = write_lines([GOOD, {'user_id': 'bob', 'texts': [], 'logprobs': []}])
  expected = {'ann': Generation(['Title: Glue.', ''], [-1.5, -2], [True, False]), 'bob': Generation([], [])}
  assert read_generations(path) == read_generations(path.parent) == expected


BAD = {
  '{"user_id": "bob"': 'not JSON',
  '[1, 2]': 'expected an object',
  '{"texts": [], "logprobs": []}': 'user_id',
  '{"user_id": "bob", "logprobs": []}': '"texts"',
  '{"user_id": "bob", "texts": [1], "logprobs": [-1]}': '"texts"',
  '{"user_id": "bob", "texts": ["a"], "logprobs": ["b"]}': '"logprobs"',
  '{"user_id": "bob", "texts": ["a"], "logprobs": [true]}': '"logprobs"',
  '{"user_id": "bob", "texts": ["a"], "logprobs": [-1, -2]}': 'differ in length',
  '{"user_id": "bob", "texts": ["a"], "logprobs": [-1], "finished": []}': 'differ in length',
  '{"user_id": "bob", "texts": ["a"], "logprobs": [-1], "finished": [1]}': '"finished"',
  '{"user_id": "bob", "texts": ["a"], "logprobs": [NaN]}': 'not finite',
  '{"user_id": "bob", "texts": ["a"], "logprobs": [-Infinity]}': 'not finite',
  '{"user_id": "bob", "texts": ["a"], "logprobs": [1' + '0' * 400 + ']}': 'too large',
  '{"user_id": "ann", "texts": [], "logprobs": []}': "'ann' has a line already",
  '\udcff': 'not JSON',
}


@pytest.mark.parametrize(('line', 'told'), BAD.items())
def test_a_bad_line_is_named_by_its_number(tmp_path, line, told):
  path = tmp_path / 'generations.jsonl'
  good = '{"user_id": "ann", "texts": ["a"], "logprobs": [-1]}\n'
  path.write_bytes((good + line + '\n').encode(errors='surrogateescape'))
  with pytest.raises(UserError, match=re.escape(told)) as raised:
    read_generations(path)
  assert f'{path}: line 2: ' in str(raised.value) and 'calrec infer' in str(raised.value)


def test_a_missing_and_a_truncated_file(tmp_path, write_lines):
  with pytest.raises(UserError, match='generations.jsonl.gz'):
    read_generations(tmp_path)
  path = write_lines([{**GOOD, 'user_id': str(n)} for n in range(1000)])
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match='truncated'):
    read_generations(path)


def test_shares_by_hand():
  many = [Generation(['a', ' ', 'b'], [-1, -2, -3], [True, True, False]), Generation(['c'], [-1], [False])]
  assert shares(many, {'a', 'c', 'd'}) == {'users': 2, 'texts': 4, 'unfinished': .5, 'empty': .25, 'exact_match': .5}
  assert shares([*many, Generation(['x'], [-1])], set())['unfinished'] is None
  nothing = {'users': 0, 'texts': 0, 'unfinished': None, 'empty': None, 'exact_match': None}
  assert shares([], set()) == nothing
