"""Files of servers that drop, lie and change: what appears is the whole file, or nothing and one clear line."""

import base64
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import hypothesis
import pytest
from file_server import FileServer
from hypothesis import strategies
from refusals import refused

from calrec_jax.data import http_files
from calrec_jax.errors import UserError

CONTENT = gzip.compress(random.Random(0).randbytes(300_000), mtime=0)  # larger than what a socket buffers
OTHER = gzip.compress(random.Random(1).randbytes(280_000), mtime=0)


pytestmark = pytest.mark.usefixtures('no_waits')


@pytest.fixture
def server():
  with FileServer({'/a.gz': CONTENT}) as server:
    yield server


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
  return tmp_path / 'a.gz'


def get(server: FileServer, path: pathlib.Path) -> str:
  """The sha256 that a fetch tells of."""
  return http_files.fetch(http_files.look(server.url + '/a.gz'), path, progress=False)[1]


def stop_halfway(server: FileServer, path: pathlib.Path) -> int:
  """A command that gives up after one try that got half; returns the bytes that are here."""
  server.cues['/a.gz'] = ['half']
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(http_files, 'TRIES', 1)
    refused(lambda: get(server, path), 'a.gz', 'the same command again: it goes on where it stopped')
  server.cues.clear()
  server.asked.clear()
  assert not path.exists()
  return path.with_name('a.gz.partial').stat().st_size


def alone(path: pathlib.Path, content: bytes = CONTENT) -> bool:
  """Whether the folder holds the file, and no scraps."""
  return path.read_bytes() == content and [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_is_fetched(server, path):
  remote = http_files.look(server.url + '/a.gz')
  assert remote.size == len(CONTENT) and remote.etag and not remote.checksums
  assert get(server, path) == hashlib.sha256(CONTENT).hexdigest() and alone(path)


def test_a_lost_connection_goes_on_where_it_broke(server, path):
  server.cues['/a.gz'] = ['half', 'half', '']
  get(server, path)
  half, three_quarters = len(CONTENT) // 2, len(CONTENT) // 2 + (len(CONTENT) - len(CONTENT) // 2) // 2
  assert alone(path) and server.contents_asked('/a.gz') == ['', f'bytes={half}-', f'bytes={three_quarters}-']


@pytest.mark.parametrize('version', ['ETag', 'Last-Modified'])
def test_the_next_command_goes_on_where_one_stopped(server, path, version):
  server.versions = version
  here = stop_halfway(server, path)
  assert here == len(CONTENT) // 2 == http_files.partial_size(http_files.look(server.url + '/a.gz'), path)
  get(server, path)
  assert alone(path) and server.contents_asked('/a.gz') == [f'bytes={here}-']


def test_a_file_that_is_here_but_for_its_name_is_not_asked_for(server, path):
  stop_halfway(server, path)
  path.with_name('a.gz.partial').write_bytes(CONTENT)
  get(server, path)
  assert alone(path) and server.contents_asked('/a.gz') == []


@pytest.mark.parametrize('what', ['ranges', 'versions'])
def test_a_server_without_ranges_or_versions_sends_all_again(server, path, what):
  setattr(server, what, '')
  here = stop_halfway(server, path)
  assert here and http_files.partial_size(http_files.look(server.url + '/a.gz'), path) == (here if what == 'ranges' else 0)
  server.cues['/a.gz'] = ['half', '']
  get(server, path)
  assert alone(path)


@pytest.mark.parametrize('when', ['between commands', 'between tries', 'after the question'])
def test_two_versions_are_never_glued(server, path, when):
  if when == 'between commands':
    stop_halfway(server, path)
    server.files['/a.gz'] = OTHER
    get(server, path)
  elif when == 'after the question':
    remote = http_files.look(server.url + '/a.gz')
    server.files['/a.gz'] = OTHER
    assert http_files.fetch(remote, path)[0] == http_files.look(server.url + '/a.gz')
  else:
    remote = http_files.look(server.url + '/a.gz')
    server.cues['/a.gz'] = ['half', '']
    original = http_files._Patience.wait

    def change(*arguments: object) -> None:
      server.files['/a.gz'] = OTHER
      original(*arguments)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(http_files._Patience, 'wait', change)
      http_files.fetch(remote, path)
  assert alone(path, OTHER)


def test_a_part_is_asked_for_on_condition_of_its_version(server, path):
  stop_halfway(server, path)
  server.files['/a.gz'] = other = gzip.compress(random.Random(2).randbytes(300_000), mtime=0)
  server.cues['/a.gz'] = ['unnamed']
  remote = dataclasses.replace(http_files.look(server.url + '/a.gz'), etag=json.loads(
      path.with_name('a.gz.partial.json').read_text())['version'])  # it changes after the question
  assert remote.size == len(other)
  http_files.fetch(remote, path)
  assert alone(path, other)


def test_a_weak_version_stands_for_no_bytes(server):
  server.headers, server.versions = {'ETag': 'W/"1"'}, ''
  assert http_files.look(server.url + '/a.gz').version == ''


def test_a_beginning_of_another_address_is_not_gone_on_with(server, path):
  stop_halfway(server, path)
  server.files['/b/a.gz'] = CONTENT
  http_files.fetch(http_files.look(server.url + '/b/a.gz'), path)
  assert alone(path) and server.contents_asked('/b/a.gz') == ['']


def test_another_part_than_asked_for_is_not_taken(server, path):
  stop_halfway(server, path)
  server.cues['/a.gz'] = ['elsewhere', '']
  get(server, path)
  assert alone(path)


def test_a_beginning_longer_than_the_file_begins_anew(server, path):
  stop_halfway(server, path)
  path.with_name('a.gz.partial').write_bytes(CONTENT + b'more')
  get(server, path)
  assert alone(path)


@pytest.mark.parametrize('cues', [['503', '503', ''], ['429', ''], ['500', 'half', '502', '']])
def test_what_passes_is_waited_for(server, path, cues):
  remote = http_files.look(server.url + '/a.gz')
  server.cues['/a.gz'] = cues
  http_files.fetch(remote, path)
  assert alone(path)


def test_a_server_asks_for_time(server, path, monkeypatch):
  waits = []
  monkeypatch.setattr(http_files, 'FIRST_WAIT_SECONDS', 1.)
  monkeypatch.setattr(time, 'sleep', waits.append)
  remote = http_files.look(server.url + '/a.gz')
  server.headers_of_errors = {'Retry-After': '7'}
  server.cues['/a.gz'] = ['503', '503', '503', '503', '']
  http_files.fetch(remote, path)
  assert alone(path) and waits == [7, 7, 7, 8]


@pytest.mark.parametrize(('cue', 'words'), [
    ('404', ['no such file (404']), ('410', ['no such file']), ('403', ['answers 403 Forbidden', '--mirror']),
    ('503', ['answers 503', '6 times in a row', 'same command again']), ('302', ['answers 302']),
    ('more', ['says', 'and sends']), ('fewer', ['says', 'and sends']), ('chunked more', ['sends more than the']),
])
def test_a_server_that_does_not_give_it(server, path, cue, words):
  remote = http_files.look(server.url + '/a.gz')
  server.cues['/a.gz'] = [cue]
  refused(lambda: http_files.fetch(remote, path), '/a.gz', *words)
  assert list(path.parent.iterdir()) == []


def test_a_length_that_is_never_reached(server, path):
  server.ranges = False
  server.cues['/a.gz'] = ['half']
  refused(lambda: get(server, path), f'ended after {len(CONTENT) // 2:,} of {len(CONTENT):,} bytes', 'same command again')
  assert not path.exists()


def test_servers_without_heads_or_lengths(server, path):
  server.knows_head = False
  server.cues['/a.gz'] = ['chunked']
  remote = http_files.look(server.url + '/a.gz')
  assert remote.size is None and remote.etag
  http_files.fetch(remote, path)
  assert alone(path)


def test_a_file_that_has_moved(server, path):
  server.redirects['/old.gz'] = '/a.gz'
  http_files.fetch(http_files.look(server.url + '/old.gz'), path)
  assert alone(path)
  server.redirects['/old.gz'] = '/old.gz'
  refused(lambda: http_files.look(server.url + '/old.gz'), 'old.gz', 'answers 302', '--mirror')


@pytest.mark.parametrize(('content', 'words'), [
    (CONTENT[:-9], ['not whole']), (CONTENT[:1000] + b'x' + CONTENT[1001:], ['not whole']), (CONTENT + b'tail', ['not whole']),
    (b'<html>Please log in</html>', ['a web page']), (b'{"asin": "a"}', ['something else']), (b'', ['empty'])])
def test_a_file_that_is_no_whole_gzip(server, path, content, words):
  server.files['/a.gz'] = content
  refused(lambda: get(server, path), '/a.gz', 'removed', *words)
  assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(('content', 'words'), [
    (b'\n <!DOCTYPE html><html>Moved</html>', ['a web page', 'not the file that']), (b'', ['empty'])])
def test_a_file_of_text_that_is_a_web_page_or_empty(server, path, content, words):
  server.files['/a.csv'] = content
  text = path.with_name('a.csv')
  refused(lambda: http_files.fetch(http_files.look(server.url + '/a.csv'), text), '/a.csv', 'removed', *words)
  assert list(path.parent.iterdir()) == []
  server.files['/a.csv'] = b'u,i,5.0,1\n'
  http_files.fetch(http_files.look(server.url + '/a.csv'), text)
  assert text.read_bytes() == b'u,i,5.0,1\n'


def test_members_of_a_gzip_file_are_all_read(server, path):
  server.files['/a.gz'] = CONTENT + OTHER
  get(server, path)
  assert alone(path, CONTENT + OTHER)
  path.unlink()
  server.files['/a.gz'] = CONTENT + OTHER[:-1]
  refused(lambda: get(server, path), 'not whole')


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    steps=strategies.lists(strategies.tuples(strategies.sampled_from(
        ['half', '503', 'elsewhere', 'chunked', 'more', '404', '']), strategies.booleans()), max_size=8),
    ranges=strategies.booleans(), versions=strategies.sampled_from(['ETag', 'Last-Modified', '']))
def test_whatever_a_server_does_what_appears_is_its_file(steps, ranges, versions):
  """Commands that give up at once, one after the other, and versions that change between them."""
  contents = [gzip.compress(random.Random(seed).randbytes(3000), mtime=0) for seed in range(2)]
  with FileServer({'/a.gz': contents[0]}) as server, tempfile.TemporaryDirectory() as folder, (
      pytest.MonkeyPatch.context()) as patch:
    patch.setattr(http_files, 'TRIES', 1)
    server.ranges, server.versions, path = ranges, versions, pathlib.Path(folder, 'a.gz')
    for cue, changes in steps:
      server.files['/a.gz'] = contents[changes]
      server.cues['/a.gz'] = [cue]
      with contextlib.suppress(UserError):
        get(server, path)
        assert alone(path, contents[changes])
        path.unlink()
      assert not path.exists()
    server.cues.clear()
    get(server, path)
    assert alone(path, server.files['/a.gz'])


MD5 = hashlib.md5(CONTENT)


@pytest.mark.parametrize('headers', [
    {'Content-MD5': base64.b64encode(MD5.digest()).decode()},
    {'x-goog-hash': f'crc32c=AAAAAA==,md5={base64.b64encode(MD5.digest()).decode()}'},
    {'ETag': f'"{MD5.hexdigest()}"', 'x-amz-request-id': '1'}])
def test_the_checksum_that_a_server_gives(server, path, headers):
  server.headers = headers
  server.versions = '' if 'ETag' in headers else 'ETag'
  assert http_files.look(server.url + '/a.gz').checksums == {'md5': MD5.hexdigest()}
  get(server, path)
  assert alone(path)
  path.unlink()
  server.files['/a.gz'] = OTHER
  refused(lambda: get(server, path), 'its md5 is', 'the server says', 'removed')
  assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize('headers', [
    {'ETag': f'"{MD5.hexdigest()}-3"', 'x-amz-request-id': '1'}, {'ETag': f'"{MD5.hexdigest()}"'}, {'Content-MD5': '?'},
    {'ETag': f'"{MD5.hexdigest()}"', 'x-amz-request-id': '1', 'x-amz-server-side-encryption': 'aws:kms'}])
def test_what_is_no_checksum(server, headers):
  server.headers, server.versions = headers, ''
  assert http_files.look(server.url + '/a.gz').checksums == {}


@pytest.mark.parametrize('algorithm', ['sha256', 'md5'])
def test_a_checksum_in_a_file_beside(server, path, algorithm):
  digest = hashlib.new(algorithm, CONTENT).hexdigest()
  server.files[f'/a.gz.{algorithm}'] = f'{digest.upper()}  a.gz\n'.encode()
  assert http_files.look(server.url + '/a.gz').checksums == {algorithm: digest}
  get(server, path)
  assert alone(path)
  path.unlink()
  server.files['/a.gz'] = OTHER
  refused(lambda: get(server, path), f'its {algorithm} is')
  server.files[f'/a.gz.{algorithm}'] = b'<html>no such page</html>'
  assert http_files.look(server.url + '/a.gz').checksums == {}


def test_a_full_disk_keeps_what_came(server, path, monkeypatch):
  original = http_files._copy

  class Full:
    """A file that takes 1,000 bytes, of a disk that has no more."""

    def __init__(self, file):
      self._file, self.name, self._written = file, file.name, False

    def write(self, data: memoryview) -> int:
      if self._written:
        raise OSError(errno.ENOSPC, 'No space left on device')
      self._written = True
      return self._file.write(data[:1000])
  monkeypatch.setattr(http_files, '_copy', lambda response, file, *more: original(response, Full(file), *more))
  refused(lambda: get(server, path), 'a.gz.partial', 'No space left on device', 'make room', 'goes on where it stopped')
  monkeypatch.undo()
  assert not path.exists() and path.with_name('a.gz.partial').read_bytes() == CONTENT[:1000]
  get(server, path)
  assert alone(path) and server.contents_asked('/a.gz') == ['', 'bytes=1000-']


def test_a_folder_that_cannot_be_written(server, tmp_path):
  refused(lambda: get(server, tmp_path / 'none/a.gz'), 'a.gz.partial', 'cannot be written', '--out')


def test_nobody_answers(path):
  with FileServer({}) as server:
    address = server.url + '/a.gz'
  refused(lambda: http_files.look(address), '/a.gz', 'Connection refused', '4 times in a row', 'check the connection')


FETCH = '''
import pathlib, sys
from calrec_jax.data import http_files
http_files.fetch(http_files.look(sys.argv[1]), pathlib.Path(sys.argv[2]))
'''


def test_killed_in_the_middle_the_same_command_goes_on(server, path):
  server.cues['/a.gz'] = ['slow', '']
  partial, command = path.with_name('a.gz.partial'), [sys.executable, '-c', FETCH, server.url + '/a.gz', str(path)]
  first = subprocess.Popen(command)
  deadline = time.monotonic() + 30
  while not (partial.exists() and partial.stat().st_size > 20_000) and time.monotonic() < deadline:
    time.sleep(0.01)
  refused(lambda: get(server, path), 'another command fetches this file')
  first.send_signal(signal.SIGKILL)
  first.wait()
  here = partial.stat().st_size
  assert not path.exists() and 20_000 < here < len(CONTENT) and partial.read_bytes() == CONTENT[:here]
  assert json.loads(path.with_name('a.gz.partial.json').read_text())['size'] == len(CONTENT)
  subprocess.run(command, check=True)
  assert alone(path) and server.contents_asked('/a.gz')[-1] == f'bytes={here}-'
