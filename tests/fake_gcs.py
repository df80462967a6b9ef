"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs and TensorStore use, with objects in memory.

`with FakeGcs() as gcs:` serves it on this machine; `gcs.environment` has the variables that lead the clients there.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
import zlib
from typing import Any

from local_server import Handler, LocalServer


class FakeGcs(LocalServer):
  """A server with any bucket; `objects` maps (bucket, name) to (content, generation)."""

  def __init__(self):
    self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
    self.sessions: dict[str, tuple[str, str, bytearray]] = {}
    self.refuse: str | None = None  # uploads of names that match are refused
    self.uploaded: list[str] = []
    self.lock, self.generation = threading.RLock(), 0
    super().__init__(_Handler)

  @property
  def environment(self) -> dict[str, str]:
    return {'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url, 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'abc',
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'FSSPEC_GCS_TOKEN': 'anon'}

  def names(self, bucket: str, prefix: str = '') -> list[str]:
    with self.lock:
      return sorted(name for place, name in self.objects if place == bucket and name.startswith(prefix))

  def __getitem__(self, place: tuple[str, str]) -> bytes:
    return self.objects[place][0]

  def put(self, bucket: str, name: str, content: bytes, given: int | None = None) -> dict[str, Any] | None:
    """Stores an object; None where it is not of the generation that was `given`."""
    with self.lock:
      there = self.objects.get((bucket, name), (b'', 0))[1]
      if given is not None and given != there:
        return None
      self.generation += 1
      self.uploaded.append(name)
      self.objects[bucket, name] = content, self.generation
      return self.about(bucket, name)

  def about(self, bucket: str, name: str) -> dict[str, Any]:
    content, generation = self.objects[bucket, name]
    return {'kind': 'storage#object', 'bucket': bucket, 'name': name, 'size': str(len(content)), 'generation': str(generation),
            'metageneration': '1', 'updated': f'2026-01-01T00:00:00.{generation % 10**6:06d}Z',
            'timeCreated': '2026-01-01T00:00:00.000Z', 'storageClass': 'STANDARD', 'etag': f'"{generation}"',
            'crc32c': base64.b64encode(zlib.crc32(content).to_bytes(4, 'big')).decode(),
            'md5Hash': base64.b64encode(hashlib.md5(content).digest()).decode()}


class _Handler(Handler):
  """One request. Names in paths are percent-encoded."""

  world: FakeGcs

  def do_GET(self) -> None:
    path, query = self._asked()
    if match := re.fullmatch(r'/storage/v1/b/([^/]+)/o', path):
      self._answer(self._listing(match[1], query))
    elif match := re.fullmatch(r'(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)', path):
      self._object(*map(urllib.parse.unquote, match.groups()), query)
    elif match := re.fullmatch(r'/storage/v1/b/([^/]+)', path):
      self._answer({'kind': 'storage#bucket', 'name': match[1], 'id': match[1]})
    else:
      self._refuse(404, path)

  def do_POST(self) -> None:
    path, query = self._asked()
    body = self._body()
    if 'upload_id' in query:
      self._chunk(query['upload_id'], body)
    elif match := re.fullmatch(r'/upload/storage/v1/b/([^/]+)/o', path):
      self._upload(match[1], query, body)
    elif match := re.fullmatch(r'/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)', path):
      source, name, target, new = map(urllib.parse.unquote, match.groups())
      if (source, name) not in self.world.objects:
        return self._refuse(404, name)
      self._answer({'kind': 'storage#rewriteResponse', 'done': True,
                    'resource': self.world.put(target, new, self.world[source, name])})
    elif path.startswith('/batch/storage/v1'):
      self._batch(body)
    else:
      self._refuse(404, path)

  def do_PUT(self) -> None:
    self._chunk(self._asked()[1]['upload_id'], self._body())

  def _chunk(self, session: str, body: bytes) -> None:
    """A part of a resumable upload; the last one names the size of all."""
    bucket, name, held = self.world.sessions[session]
    held += body
    end = self.headers.get('Content-Range', '/*').rpartition('/')[2]
    if end != '*' and len(held) >= int(end):
      self._answer(self.world.put(bucket, name, bytes(held)))
    else:
      self._answer({}, 308, {'Range': f'bytes=0-{len(held) - 1}'})

  def do_DELETE(self) -> None:
    path, _ = self._asked()
    match = re.fullmatch(r'/storage/v1/b/([^/]+)/o/([^/]+)', path)
    self._answer(None, 204 if match and self._deleted(*map(urllib.parse.unquote, match.groups())) else 404)

  def _asked(self) -> tuple[str, dict[str, str]]:
    parts = urllib.parse.urlsplit(self.path)
    return parts.path, dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def _deleted(self, bucket: str, name: str) -> bool:
    with self.world.lock:
      return self.world.objects.pop((bucket, name), None) is not None

  def _listing(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    first, stop = query.get('startOffset', ''), query.get('endOffset')
    items, prefixes = [], set()
    with self.world.lock:
      for name in self.world.names(bucket, prefix):
        if name < first or (stop and name >= stop):
          continue
        head, slash, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, '', '')
        if slash:
          prefixes.add(prefix + head + slash)
        else:
          items.append(self.world.about(bucket, name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}

  def _object(self, bucket: str, name: str, query: dict[str, str]) -> None:
    if (bucket, name) not in self.world.objects:
      return self._refuse(404, name)
    if query.get('alt') != 'media':
      return self._answer(self.world.about(bucket, name))
    content, generation = self.world.objects[bucket, name]
    about = {'x-goog-generation': str(generation), 'ETag': f'"{generation}"'}
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if asked is None:
      return self._answer(content, 200, about)
    first = int(asked[1]) if asked[1] else len(content) - int(asked[2])
    stop = min(int(asked[2]) + 1, len(content)) if asked[1] and asked[2] else len(content)
    if first >= len(content):
      return self._refuse(416, name)
    self._answer(content[first:stop], 206, about | {'Content-Range': f'bytes {first}-{stop - 1}/{len(content)}'})

  def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
    name, given = query.get('name'), query.get('ifGenerationMatch')
    if query['uploadType'] == 'resumable':
      name = name or json.loads(body)['name']
      upload = f'session{len(self.world.sessions)}'
      self.world.sessions[upload] = bucket, name, bytearray()
      place = f'{self.world.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}'
      return self._answer({}, 200, {'Location': place})
    if query['uploadType'] == 'multipart':
      mark = re.search('boundary=["\']?([^"\';]+)', self.headers['Content-Type'])[1].encode()
      about, content = (part.split(b'\r\n\r\n', 1)[1] if b'\r\n\r\n' in part else part.split(b'\n\n', 1)[1]
                        for part in body.split(b'--' + mark)[1:3])
      name = name or json.loads(about)['name']
      body = content.removesuffix(b'\r\n').removesuffix(b'\n') if not content.endswith(b'\r\n') else content[:-2]
    if self.world.refuse and re.search(self.world.refuse, name):
      return self._refuse(403, name)
    stored = self.world.put(bucket, name, body, None if given is None else int(given))
    self._answer(stored, 200) if stored else self._refuse(412, name)

  def _batch(self, body: bytes) -> None:
    """Deletes, each a part of a multipart message."""
    parts = []
    for identity, bucket, name in re.findall(rb'Content-ID: <?([^>\r\n]+)>?.*?DELETE /storage/v1/b/([^/]+)/o/([^/? ]+)', body,
                                             re.S):
      done = self._deleted(bucket.decode(), urllib.parse.unquote(name.decode()))
      parts.append(f'--mark\r\nContent-Type: application/http\r\nContent-ID: <response-{identity.decode()}>\r\n\r\n'
                   f'HTTP/1.1 {"204 No Content" if done else "404 Not Found"}\r\nContent-Length: 0\r\n\r\n\r\n')
    self._answer(''.join([*parts, '--mark--\r\n']).encode(), 200, {'Content-Type': 'multipart/mixed; boundary=mark'})

  def _refuse(self, code: int, what: str) -> None:
    self._answer({'error': {'code': code, 'message': f'refused: {what}'}}, code)

  def _answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
    content = value if isinstance(value, bytes) else b'' if value is None else json.dumps(value).encode()
    self.send_response(code)
    for name, text in {'Content-Type': 'application/json', **(headers or {})}.items():
      self.send_header(name, text)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)
