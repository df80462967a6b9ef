"""Files unpacked piece by piece, in threads: nothing is lost, doubled or left behind, whatever the pieces."""

import gzip
import pathlib
import threading

import pytest
from isal import igzip

from calrec_jax.data import amazon, json_lines, unpacking
from calrec_jax.errors import UserError

LINES = b''.join(b'{"a": %d}\n' % number + b'\n' * (number % 7 == 0) for number in range(3000))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  monkeypatch.setattr(unpacking, '_PIECE_BYTES', 5000)
  monkeypatch.setattr(json_lines, '_CHUNK_BYTES', 777)


def write(path, content):
  path.write_bytes(content)
  return path


def read(work, paths, threads):
  """[(texts of the pieces, source)] of each file."""
  with unpacking.unpack(paths, work, threads=threads, progress=False) as files:
    return [([piece.read_bytes() for piece in file], file.source) for file in files]


@pytest.mark.parametrize('threads', [1, 3])
def test_the_pieces_are_the_file_in_whole_lines(tmp_path, threads):
  work = tmp_path / 'work'
  work.mkdir()
  contents = [LINES, b'', LINES[:-1], LINES[:20], b'\n \n']
  paths = [write(tmp_path / f'{number}.gz', gzip.compress(content)) for number, content in enumerate(contents)]
  paths.append(write(tmp_path / 'plain[1]*.json', LINES))
  found = read(work, paths, threads)
  for path, content, (pieces, source) in zip(paths, [*contents, LINES], found, strict=True):
    assert b''.join(pieces) == content
    assert all(piece.endswith(b'\n') for piece in pieces[:-1])
    assert source == json_lines.inspect(path)
    assert source.lines == sum(1 for line in content.split(b'\n') if line.strip())
  assert all(5000 <= len(piece) < 6000 for piece in found[0][0][:-1])
  assert [len(pieces) for pieces, _ in found[1:]] == [0, len(found[0][0]), 1, 1, 1]
  assert not list(work.iterdir())


def test_few_pieces_lie_on_the_disk_and_none_of_those_read(tmp_path):
  paths = [write(tmp_path / f'{number}.gz', gzip.compress(LINES)) for number in range(6)]
  with unpacking.unpack(paths, tmp_path, threads=2, progress=False) as files:
    for file in files:
      for piece in file:
        assert piece.exists() and sum(1 for found in piece.parent.iterdir()) <= 3
      assert not list(piece.parent.iterdir())


def test_who_stops_reading_leaves_nothing_behind(tmp_path):
  paths = [write(tmp_path / f'{number}.gz', gzip.compress(LINES)) for number in range(4)]
  before = threading.active_count()
  with pytest.raises(ZeroDivisionError), unpacking.unpack(paths, tmp_path, threads=2, progress=False) as files:
    next(iter(files[0]))
    raise ZeroDivisionError
  assert threading.active_count() == before
  assert sorted(tmp_path.iterdir()) == paths


def test_a_damaged_file_is_told_to_its_reader_after_the_pieces_before(tmp_path):
  paths = [write(tmp_path / 'good.gz', gzip.compress(LINES)), write(tmp_path / 'cut.gz', gzip.compress(LINES)[:-30])]
  with unpacking.unpack(paths, tmp_path, threads=2, progress=False) as (good, cut):
    assert b''.join(piece.read_bytes() for piece in good) == LINES
    with pytest.raises(UserError, match=r'cut\.gz: is truncated or damaged'):
      list(cut)


def test_no_room_for_a_piece(tmp_path, monkeypatch):
  def full(self, mode='r'):
    if mode == 'wb':
      raise OSError(28, 'No space left on device')
    return open(self, mode)
  path = write(tmp_path / 'x.gz', gzip.compress(LINES))
  monkeypatch.setattr(pathlib.Path, 'open', full)
  with unpacking.unpack([path], tmp_path, threads=1, progress=False) as [file]:
    with pytest.raises(UserError, match=r'x\.gz cannot be unpacked there \(No space left on device\).*--tmp_dir'):
      list(file)


@pytest.mark.parametrize('suffix', ['json.gz', 'json', 'csv.gz'])
def test_pieces_make_no_difference_to_histories(tmp_path, monkeypatch, suffix):
  def rows(number):
    for user in range(40):
      for day in range(12):
        time, item = 1_400_000_000 + day // 3 * 86_400, (user * 7 + day * (number + 3)) % 30
        yield (f'B0000000{item:02},U{user},5.0,{time}\n' if suffix == 'csv.gz' else
               f'{{"reviewerID": "U{user}", "asin": "B{item}", "unixReviewTime": {time}, "overall": 5.0}}\n')
  paths = []
  for number in range(3):
    paths.append(tmp_path / f'{number}.{suffix}')
    text = ''.join(rows(number)).encode()
    text = b'item,user,rating,timestamp\n' + text if suffix == 'csv.gz' else b'\xef\xbb\xbf' + text
    paths[-1].write_bytes(gzip.compress(text, mtime=0) if suffix.endswith('gz') else text)
  prepare = lambda out, **more: amazon.prepare_dumps(paths, name='x', out=tmp_path / out, progress=False, **more)
  prepare('pieces', threads=1)
  prepare('in_parallel', threads=4)
  monkeypatch.setattr(unpacking, '_PIECE_BYTES', 1 << 27)
  prepare('whole')
  contents = [[path.read_bytes() for path in sorted((tmp_path / out).iterdir())] for out in ('pieces', 'in_parallel', 'whole')]
  assert contents[0] == contents[1] == contents[2]


def test_isal_unpacks_what_gzip_packs(tmp_path):
  """Several members, a file's name in the header, zeros at the end: all that gzip takes."""
  with gzip.GzipFile('name', 'wb', fileobj=(file := (tmp_path / 'x.gz').open('wb'))) as packed:
    packed.write(LINES)
  file.close()
  content = (tmp_path / 'x.gz').read_bytes() + gzip.compress(LINES) + bytes(600)
  (tmp_path / 'x.gz').write_bytes(content)
  assert b''.join(text for text, _ in json_lines.blocks(tmp_path / 'x.gz')) == gzip.decompress(content) == LINES * 2
  assert igzip.decompress(content) == LINES * 2
