"""A partial file gives back the finished batches, whatever byte it was cut at."""

import errno
import gzip

import pytest

from calrec_jax.errors import UserError
from calrec_jax.inference.partial import Partial, finished_rows, partial_file, partial_files

SETTINGS = {'seed': 0, 'temperature': 0.5, 'max_users': None}
BATCHES = [[{'user_id': 'ann', 'texts': ['Glue ✓']}, {'user_id': 'bob', 'texts': []}],
           [{'user_id': 'cat', 'texts': ['']}]]


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'folder' / 'generations.jsonl.gz.partial'


def written(path, batches=BATCHES, settings=SETTINGS):
  with Partial(path, settings) as partial:
    for rows in batches:
      partial.append(rows)
  return path.read_bytes()


def reopened(path, settings=SETTINGS):
  with Partial(path, settings) as partial:
    return partial.batches


def test_finished_batches_come_back(path):
  written(path, BATCHES[:1])
  assert reopened(path) == BATCHES[:1]
  written(path, BATCHES[1:])
  assert reopened(path) == BATCHES


def test_it_is_a_readable_gzip_file(path):
  written(path)
  assert len(gzip.decompress(path.read_bytes()).splitlines()) == 4


def test_cut_at_any_byte_it_holds_the_whole_batches_and_goes_on_to_the_same_bytes(path):
  ends = [len(written(path, batches)) for batches in ([], BATCHES[:1], BATCHES[1:])]  # each call goes on
  whole = path.read_bytes()
  assert ends[-1] == len(whole)
  for size in range(len(whole) + 1):
    path.write_bytes(whole[:size])
    n_whole = sum(size >= end for end in ends[1:])
    assert reopened(path) == BATCHES[:n_whole], size
    assert path.stat().st_size == ends[n_whole]
    assert written(path, BATCHES[n_whole:]) == whole


def test_a_damaged_batch_and_what_follows_are_dropped(path):
  begun = len(written(path, []))
  whole = written(path)
  path.write_bytes(whole[:begun + 12] + b'\0\0\0\0' + whole[begun + 16:])
  assert reopened(path) == []
  path.write_bytes(whole + b'\0' * 512)  # as some file systems leave it after a power cut
  assert reopened(path) == BATCHES
  assert path.read_bytes() == whole


def test_other_settings_are_refused_and_named_and_the_file_stays(path):
  whole = written(path)
  with pytest.raises(UserError, match=r'temperature: 0.5 there, 0.7 now\).*remove it to begin anew'):
    Partial(path, {**SETTINGS, 'temperature': 0.7})
  with pytest.raises(UserError, match='max_users: None there, 5 now'):
    Partial(path, {**SETTINGS, 'max_users': 5})
  assert path.read_bytes() == whole


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be written'):
    Partial(tmp_path / 'file' / 'x.partial', SETTINGS)


def test_a_full_disk_keeps_what_is_finished(path, monkeypatch):
  with Partial(path, SETTINGS) as partial:
    partial.append(BATCHES[0])
    def full(rows):
      partial._file.write(b'\x1f\x8b')  # a half-written member
      partial._file.flush()
      raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(partial, '_append', full)
    with pytest.raises(UserError, match='No space left on device.*make room'):
      partial.append(BATCHES[1])
  assert reopened(path) == BATCHES[:1]


def test_the_files_of_all_processes_are_read_together(tmp_path):
  out = tmp_path / 'generations.jsonl.gz'
  for process, batches in enumerate([BATCHES[:1], BATCHES[1:]]):
    written(partial_file(out, process), batches)
  for other in ('other.partial', 'generations.jsonl.gz.partial-x', 'generations.jsonl.gz'):
    (tmp_path / other).write_bytes(b'not one of them')
  assert partial_files(out) == [partial_file(out), partial_file(out, 1)]
  assert list(finished_rows(out, SETTINGS)) == ['ann', 'bob', 'cat']
  with pytest.raises(UserError, match='seed: 0 there, 1 now'):
    finished_rows(out, SETTINGS | {'seed': 1})
