"""JSON lines: files are told by content, and bad ones are named by file and line."""

import gzip
import hashlib
import json
import pathlib
import tempfile

import hypothesis
import pytest
from hypothesis import strategies

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError

TEXT = b'{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}'


def numbers(path, tolerated=0):
  return [(number, row['a']) for number, row in json_lines.objects(path, json_lines.BadLines(path, tolerated))]


@pytest.mark.parametrize('name, content', [
    ('plain.jsonl', TEXT), ('gzipped.jsonl.gz', gzip.compress(TEXT)), ('gzipped_by_content.json', gzip.compress(TEXT)),
    ('two_members.gz', gzip.compress(TEXT[:12]) + gzip.compress(TEXT[12:])),
], ids=lambda value: value if isinstance(value, str) else '')  # gzip's bytes have the time in them: no name for a test
def test_line_numbers_count_blank_lines_however_the_file_is_stored(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  assert numbers(tmp_path / name) == [(1, 1), (4, 2), (5, 3)]
  source = json_lines.inspect(tmp_path / name)
  assert source.description() == {'file': name, 'sha256': hashlib.sha256(content).hexdigest(), 'lines': 3}
  assert source.gzipped == (name != 'plain.jsonl')


def test_only_a_line_feed_ends_a_line(tmp_path):
  (tmp_path / 'x').write_text('{"a": "1\u2028\x85"}\n{"a": 2}\n', encoding='utf-8')
  assert [number for number, _ in numbers(tmp_path / 'x')] == [1, 2]


@hypothesis.given(lines=strategies.lists(strategies.sampled_from(
    [b'', b' ', b'\r', b'\t\x0b\x0c', b'{}', b' {}', b'x' * 30, b'\xef\xbb\xbf', b'\0', b'\x85', b'\x1c'])),
                  ends=strategies.booleans(), gzipped=strategies.booleans(), chunk=strategies.integers(1, 40))
def test_any_lines_are_those_between_line_feeds_however_they_are_read(lines, ends, gzipped, chunk):
  content = b'\n'.join(lines) + b'\n' * ends
  expected = [(number, line) for number, line in enumerate(content.removeprefix(b'\xef\xbb\xbf').split(b'\n'), start=1)
              if line.strip(b' \t\n\r\x0b\x0c')]
  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    patch.setattr(json_lines, '_CHUNK_BYTES', chunk)
    path = pathlib.Path(folder, 'x')
    path.write_bytes(gzip.compress(content) if gzipped else content)
    assert [(number, line.removesuffix(b'\n')) for number, line in json_lines.lines(path)] == expected
    assert json_lines.inspect(path).lines == len(expected)
    assert b''.join(block for block, _ in json_lines.blocks(path)) == content.removeprefix(b'\xef\xbb\xbf')


@pytest.mark.parametrize('chunk', [3, 7, 100])
def test_a_line_too_long_is_named_wherever_it_stands(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(json_lines, 'MAX_LINE_BYTES', 100)
  monkeypatch.setattr(json_lines, '_CHUNK_BYTES', chunk)
  path = tmp_path / 'x'
  path.write_bytes(b'a\n\n' + b'b' * 99 + b'\n')
  assert [number for number, _ in json_lines.lines(path)] == [1, 3]
  for content in (b'a\n\n' + b'b' * 101 + b'\nc\n', b'a\n\n' + b'b' * 101):
    path.write_bytes(content)
    with pytest.raises(UserError, match='line 3: longer than'):
      list(json_lines.lines(path))


def test_many_lines_are_written_as_one_write_would(tmp_path, monkeypatch):
  rows = [{'a': number, 'b': 'é' * (number % 50)} for number in range(1000)]
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  prints = []
  for n_bytes in (1, 300, 1 << 21):
    monkeypatch.setattr(json_lines, '_PACKED_BYTES', n_bytes)
    json_lines.write(tmp_path / 'x.gz', rows)
    prints.append((tmp_path / 'x.gz').read_bytes())
  assert gzip.decompress(prints[0]).decode() == text
  assert prints[0] == prints[1] == prints[2] and len(prints[0]) < len(text) / 10
  assert prints[0][:8] == b'\x1f\x8b\x08' + bytes(5)  # neither a name nor a time


@pytest.mark.parametrize('line, what', [
    (b'{"a": ', 'not JSON'), (b'[1]', 'a JSON list'), (b'null', 'a JSON NoneType'), (b'{"a": "\xff"}', 'not JSON'),
    (b'{"a": 1} {"a": 2}', 'not JSON'), (b'[' * 100_000, 'not JSON'),
])
def test_a_broken_line_is_named(tmp_path, line, what):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 4}\n')
  with pytest.raises(UserError, match=rf'x\.jsonl: line 3: {what}.*--max_bad_lines'):
    numbers(path)
  assert numbers(path, tolerated=1) == [(1, 1), (4, 4)]


def test_one_bad_line_more_than_tolerated_is_an_error(tmp_path):
  (tmp_path / 'x').write_bytes(b'oh\nno\n{"a": 3}\n')
  assert numbers(tmp_path / 'x', tolerated=2) == [(3, 3)]
  with pytest.raises(UserError, match=r'line 2: .*2 bad lines up to here, 1 tolerated'):
    numbers(tmp_path / 'x', tolerated=1)


@pytest.mark.parametrize('read', [json_lines.inspect, lambda path: list(json_lines.lines(path))])
class TestBadFiles:

  def test_missing(self, tmp_path, read):
    with pytest.raises(UserError, match=r'nowhere\.gz: no such file'):
      read(tmp_path / 'nowhere.gz')

  def test_folder(self, tmp_path, read):
    with pytest.raises(UserError, match='is a folder'):
      read(tmp_path)

  @pytest.mark.parametrize('cut', [1, 8, 40])
  def test_truncated(self, tmp_path, read, cut):
    (tmp_path / 'x.gz').write_bytes(gzip.compress(TEXT * 100)[:-cut])
    with pytest.raises(UserError, match=r'x\.gz: is truncated or damaged'):
      read(tmp_path / 'x.gz')

  def test_damaged(self, tmp_path, read):
    content = bytearray(gzip.compress(TEXT * 100))
    content[len(content) // 2] ^= 255
    (tmp_path / 'x.gz').write_bytes(content)
    with pytest.raises(UserError, match=r'x\.gz: is truncated or damaged'):
      read(tmp_path / 'x.gz')

  @pytest.mark.parametrize('content', [TEXT, b''])
  def test_not_gzip_although_its_name_says_so(self, tmp_path, read, content):
    (tmp_path / 'x.gz').write_bytes(content)
    with pytest.raises(UserError, match=r'x\.gz: is not gzip'):
      read(tmp_path / 'x.gz')
