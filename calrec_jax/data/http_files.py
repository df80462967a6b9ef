"""Files of web servers: fetched whole or not at all, from where an earlier try stopped.

Until it is whole a file is called `<name>.partial`; beside it `<name>.partial.json` says of which version of the server's
file it is the beginning. A try that goes on asks for the rest on condition that the version is still that one (If-Range), so
that two versions are never glued; a server without ranges, or without a name for its versions (ETag, Last-Modified), sends
all of it again.
"""

import base64
import binascii
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import http.client
import io
import json
import logging
import os
import pathlib
import re
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import tqdm

import calrec_jax
from calrec_jax import outputs
from calrec_jax.errors import UserError

TRIES = 6  # in a row that bring nothing
TRIES_TO_LOOK = 4
FIRST_WAIT_SECONDS = 1.  # doubles with each
LONGEST_WAIT_SECONDS = 60.
TIMEOUT_SECONDS = 30.  # in which a server sends nothing
_CHUNK_BYTES = 1 << 18
_HEX_DIGITS = {'md5': 32, 'sha256': 64}
_AGAIN = 'run the same command again: it goes on where it stopped'


class Missing(UserError):
  """The server has no such file."""


class _Lost(Exception):
  """The connection ended before the file did."""


@dataclasses.dataclass(frozen=True)
class Remote:
  """A file as its server describes it.

  Attributes:
    address: of it.
    size: in bytes; None where the server does not say.
    etag: the name of the version, with its quotes; '' where there is none that stands for equal bytes.
    modified: the time of the version as the server writes it, or ''.
    checksums: algorithm ('md5', 'sha256') to hex digest, with what the server gives.
  """

  address: str
  size: int | None
  etag: str = ''
  modified: str = ''
  checksums: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def version(self) -> str:
    """What If-Range takes; '' where the server has none."""
    return self.etag or self.modified


def look(address: str) -> Remote:
  """Asks for a file's size, version and checksum (of headers, else of a file <address>.sha256 or .md5), not for itself.

  Raises:
    Missing: it is not there.
    UserError: the server refuses, or cannot be reached.
  """
  patience = _Patience(address, TRIES_TO_LOOK)
  while True:
    try:
      try:
        with _opened(address, method='HEAD') as response:
          found = _described(address, response)
      except urllib.error.HTTPError as error:
        if error.code not in (400, 403, 405, 501):  # of servers that know no HEAD
          raise
        with _opened(address) as response:
          found = _described(address, response)
      return found if found.checksums else dataclasses.replace(found, checksums=_checksum_beside(address))
    except _Patience.ERRORS as error:
      patience.wait(error)


def partial_size(remote: Remote, path: pathlib.Path) -> int:
  """How many bytes of this version of the file are here already."""
  partial, note = _scratch(path)
  return partial.stat().st_size if partial.is_file() and _goes_on(remote, note) else 0


def forget(path: pathlib.Path) -> None:
  """Removes what earlier tries left of a file that is here."""
  for each in _scratch(path):
    each.unlink(missing_ok=True)


def fetch(remote: Remote, path: pathlib.Path, *, progress: bool = True) -> tuple[Remote, str]:
  """Fetches a file to `path`, where it appears whole, and checked.

  A connection that is lost is taken up again; after TRIES that brought nothing, the next command goes on.

  Returns:
    (the server's description of what was fetched, the sha256 of it in hex).

  Raises:
    Missing: it is not there.
    UserError: it cannot be fetched or written, or what came is not whole.
  """
  partial, note = _scratch(path)
  patience, furthest = _Patience(remote.address, TRIES), 0
  with _held(path) as file:
    while True:
      try:
        remote = _go_on(remote, file, note, path.name, progress)
        break
      except _Patience.ERRORS as error:
        here = os.fstat(file.fileno()).st_size
        if here > furthest:
          patience.failures, furthest = 0, here
        patience.wait(error)
    os.fsync(file.fileno())
    try:
      sha256 = check(partial, remote, name=path.name, progress=progress)
    except UserError as error:
      forget(path)
      raise UserError(f'{remote.address}: {error} What came was removed; run the same command again, and give another '
                      '--mirror if this comes again.') from error
    os.replace(partial, path)
  note.unlink(missing_ok=True)
  return remote, sha256


def check(path: pathlib.Path, remote: Remote, *, name: str, progress: bool = True) -> str:
  """The sha256 of a file in hex, which is read once.

  Raises UserError (a sentence): not of the size or checksum, empty, a web page, or no whole gzip although its name ends in .gz.
  """
  size = path.stat().st_size
  if remote.size is not None and size != remote.size:
    raise UserError(f'{size:,} bytes came, where the server said {remote.size:,}.')
  digests = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in {'sha256', *remote.checksums}}
  with path.open('rb') as raw, tqdm.tqdm(total=size, unit='B', unit_scale=True, delay=1, leave=False, desc=f'checking {name}',
                                         disable=None if progress else True) as bar:
    file = _Digested(raw, list(digests.values()), bar)
    start, packed = raw.peek(64)[:64], name.endswith('.gz')
    if not start:
      raise UserError('what the server sends is empty.')
    page = start.lstrip()[:1] == b'<'
    if page or packed and start[:2] != b'\x1f\x8b':
      raise UserError(f'what the server sends is {"a web page" if page else "something else"}, not the '
                      f'{"gzip " * packed}file that was asked for.')
    if packed:
      try:
        with gzip.GzipFile(fileobj=file) as unpacked:
          while unpacked.read(_CHUNK_BYTES):
            pass
      except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f'the gzip file is not whole ({error}), be its length right or not.') from error
    else:
      while file.read(_CHUNK_BYTES):
        pass
  for algorithm, expected in remote.checksums.items():
    if digests[algorithm].hexdigest() != expected:
      raise UserError(f'its {algorithm} is {digests[algorithm].hexdigest()}, where the server says {expected}.')
  return digests['sha256'].hexdigest()


class _Digested:
  """A file whose bytes are digested as they are read, for `gzip`, which reads each of them once."""

  def __init__(self, file: BinaryIO, digests: list, bar: tqdm.tqdm):
    self._file, self._digests, self._bar = file, digests, bar

  def read(self, size: int = -1) -> bytes:
    data = self._file.read(size)
    for digest in self._digests:
      digest.update(data)
    self._bar.update(len(data))
    return data


class _Patience:
  """Waits after a failure, longer each time; raises UserError after so many of them in a row, or one that will not pass."""

  ERRORS = (OSError, http.client.HTTPException, _Lost)

  def __init__(self, address: str, tries: int):
    self.address, self.tries, self.failures = address, tries, 0

  def wait(self, error: Exception) -> None:
    """Waits, or tells in one line why there is nothing to wait for."""
    what, seconds = type(error).__name__, 0.
    if isinstance(error, urllib.error.HTTPError):
      what = f'the server answers {error.code} {" ".join(str(error.reason).split())[:120]}'
      if error.code in (404, 410):
        raise Missing(f'{self.address}: there is no such file ({error.code} {error.reason})') from error
      if error.code not in (408, 425, 429) and error.code < 500:
        raise UserError(f'{self.address}: {what}; try later, or give another --mirror.') from error
      told = error.headers.get('Retry-After', '')
      seconds = float(told) if re.fullmatch(r'\d{1,6}', told) else 0.
    else:
      reason = error.reason if isinstance(error, urllib.error.URLError) else error
      if isinstance(reason, ssl.SSLCertVerificationError):
        raise UserError(f"{self.address}: the server's certificate is not good ({reason.verify_message}); give another "
                        '--mirror.') from error
      if text := ' '.join(str(getattr(reason, 'strerror', None) or reason).split())[:120]:
        what = text
    self.failures += 1
    if self.failures >= self.tries:
      raise UserError(f'{self.address}: {what}, {self.failures} times in a row; check the connection, or give another '
                      f'--mirror, and {_AGAIN}.') from error
    seconds = min(max(seconds, FIRST_WAIT_SECONDS * 2**(self.failures - 1)), LONGEST_WAIT_SECONDS)
    logging.info('%s: %s; tries again in %.0f s.', self.address, what, seconds)
    time.sleep(seconds)


def _go_on(remote: Remote, file: io.FileIO, note: pathlib.Path, name: str, progress: bool) -> Remote:
  """Fetches what is missing of a file, in one answer of the server; returns its description of what is here then."""
  start = os.fstat(file.fileno()).st_size
  if start and not (_goes_on(remote, note) and (remote.size is None or start <= remote.size)):
    logging.info('%s: begins anew; what was here is of another version, or of one that cannot be told.', name)
    start = 0
  if start and start == remote.size:
    return remote
  headers = {'Range': f'bytes={start}-', 'If-Range': remote.version} if start else {}
  try:
    response = _opened(remote.address, headers=headers)
  except urllib.error.HTTPError as error:
    if error.code == 416:
      file.truncate(0)
      raise _Lost('the server has no such part of the file') from error
    raise
  with response:
    if response.status == 206 and start:
      if not _is_the_rest(response, start, remote):
        file.truncate(0)
        raise _Lost('the server sends another part of the file than the one that was asked for')
    else:
      if start:
        logging.info('%s: begins anew; the server sends no parts, or has another version now.', name)
      remote = _agreed(remote, _described(remote.address, response))
      file.truncate(0)
      _write_note(note, remote)
      start = 0
    _copy(response, file, remote, start, name, progress)
  return remote


def _copy(response: http.client.HTTPResponse, file: io.FileIO, remote: Remote, here: int, name: str, progress: bool) -> None:
  """Appends what a server sends to `file`, which has `here` bytes."""
  with tqdm.tqdm(total=remote.size, initial=here, unit='B', unit_scale=True, desc=name, leave=False,
                 disable=None if progress else True) as bar:
    while chunk := response.read1(_CHUNK_BYTES):
      here += len(chunk)
      if remote.size is not None and here > remote.size:
        file.truncate(0)
        raise UserError(f'{remote.address}: the server sends more than the {remote.size:,} bytes that it said; run the same '
                        'command again, and give another --mirror if this comes again.')
      _write(file, chunk)
      bar.update(len(chunk))
  if remote.size is not None and here < remote.size:
    raise _Lost(f'the connection ended after {here:,} of {remote.size:,} bytes')


def _write(file: io.FileIO, chunk: bytes) -> None:
  """Writes all of it. An error of the disk is the user's to mend, not one of the connection."""
  left = memoryview(chunk)
  try:
    while left:
      left = left[file.write(left):]
  except OSError as error:
    raise UserError(f'{file.name}: cannot be written ({error.strerror}); make room, and {_AGAIN}.') from error


def _write_note(note: pathlib.Path, remote: Remote) -> None:
  try:
    outputs.write_json(note, {'address': remote.address, 'version': remote.version, 'size': remote.size})
  except OSError as error:
    raise UserError(f'{note}: cannot be written ({error.strerror}); make room, and {_AGAIN}.') from error


def _agreed(told: Remote, sent: Remote) -> Remote:
  """What the file is, after `told` was said of it and `sent` comes. UserError: one version with two sizes."""
  if sent.version != told.version:  # another version since
    return dataclasses.replace(sent, checksums=sent.checksums or told.checksums)
  if sent.size is not None and told.size is not None and sent.size != told.size:
    raise UserError(f'{told.address}: the server says {told.size:,} bytes, and sends {sent.size:,}; run the same command '
                    'again, and give another --mirror if this comes again.')
  return dataclasses.replace(told, size=sent.size if told.size is None else told.size)


def _is_the_rest(response: http.client.HTTPResponse, start: int, remote: Remote) -> bool:
  """Whether a partial answer begins at `start` and is of the version that was asked for."""
  found = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', response.headers.get('Content-Range', ''))
  version = _described(remote.address, response).version
  return (found is not None and int(found[1]) == start and (found[2] == '*' or remote.size in (None, int(found[2])))
          and version in ('', remote.version))


def _goes_on(remote: Remote, note: pathlib.Path) -> bool:
  """Whether what is here is the beginning of this version of the file."""
  try:
    told = json.loads(note.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return False
  return bool(remote.version) and told == {'address': remote.address, 'version': remote.version, 'size': remote.size}


def _scratch(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  return path.with_name(f'{path.name}.partial'), path.with_name(f'{path.name}.partial.json')


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[io.FileIO]:
  """The partial file of `path` to append to, open, and nobody else's."""
  partial, _ = _scratch(path)
  try:
    file = open(partial, 'ab', buffering=0)
  except OSError as error:
    raise UserError(f'{partial}: cannot be written ({error.strerror}); choose another --out.') from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      ours = os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
    except OSError:  # held, or finished by the one who held it
      ours = False
    if not ours:
      raise UserError(f'{partial}: another command fetches this file; wait for it.')
    try:
      yield file
    finally:
      if not os.fstat(file.fileno()).st_size:
        forget(path)


def _opened(address: str, *, method: str = 'GET', headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
  request = urllib.request.Request(address, method=method, headers={
      'User-Agent': f'calrec_jax/{calrec_jax.__version__}', 'Accept-Encoding': 'identity', **(headers or {})})
  return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def _described(address: str, response: http.client.HTTPResponse) -> Remote:
  """What the headers of an answer say of a file; of a partial answer, `size` is that of the part."""
  headers = response.headers
  length, etag = headers.get('Content-Length', ''), headers.get('ETag', '')
  checksums = {}
  given = [headers.get('Content-MD5', '') if response.status == 200 else '',
           *re.findall(r'\bmd5=([\w+/]+=*)', ','.join(headers.get_all('x-goog-hash', [])))]
  for text in filter(None, given):
    with contextlib.suppress(binascii.Error, ValueError):
      if len(digest := base64.b64decode(text, validate=True)) == 16:
        checksums['md5'] = digest.hex()
  # Object stores with the interface of S3 give the MD5 as ETag, but for what was uploaded in parts or is encrypted with a key.
  if 'x-amz-request-id' in headers and headers.get('x-amz-server-side-encryption', 'AES256') == 'AES256':
    if found := re.fullmatch('"([0-9a-f]{32})"', etag):
      checksums.setdefault('md5', found[1])
  return Remote(address, int(length) if re.fullmatch(r'\d{1,18}', length) else None,
                etag if etag.startswith('"') else '', headers.get('Last-Modified', ''), checksums)


def _checksum_beside(address: str) -> dict[str, str]:
  """The checksum in a file beside another, as `sha256sum` and `md5sum` write it; {} where there is none."""
  for algorithm in ('sha256', 'md5'):
    try:
      with _opened(f'{address}.{algorithm}') as response:
        words = response.read(4096).split()
    except urllib.error.HTTPError as error:
      if error.code < 500:
        continue
      raise
    if words and re.fullmatch(rb'[0-9a-fA-F]{%d}' % _HEX_DIGITS[algorithm], words[0]):
      return {algorithm: words[0].decode().lower()}
  return {}
