"""A web server on this machine whose files behave as a test wants, with what was asked of it.

`with FileServer({'/a.gz': b'...'}) as server:` serves them; `server.cues['/a.gz'] = [...]` has a word for each of the next
requests for a file's content (`''` is an ordinary answer), the last of which stays.
"""

import hashlib
import re
import time

from local_server import Handler, LocalServer


class FileServer(LocalServer):
  """Files by path.

  Attributes:
    url: where it is.
    files: path to content.
    cues: path to words; see `_Handler.do_GET`.
    headers, headers_of_errors: more headers of every answer with content, and of those that a cue refuses.
    asked: (method, path, Range) of each request.
    ranges, knows_head: whether it sends parts; answers HEAD.
    versions: the header that names a file's version, ETag or Last-Modified (made of the content); '' for none.
    redirects: path to where it sends those who ask for it.
  """

  def __init__(self, files: dict[str, bytes]):
    self.files, self.cues, self.headers, self.headers_of_errors = dict(files), {}, {}, {}
    self.asked: list[tuple[str, str, str]] = []
    self.ranges, self.versions, self.knows_head = True, 'ETag', True
    self.redirects: dict[str, str] = {}
    super().__init__(_Handler)

  def contents_asked(self, path: str) -> list[str]:
    """The Range of each GET of a file."""
    return [ranges for method, asked, ranges in self.asked if (method, asked) == ('GET', path)]


class _Handler(Handler):
  """One request."""

  world: FileServer

  def do_HEAD(self) -> None:
    if not self.world.knows_head:
      return self._empty(405)
    self._answer('')

  def do_GET(self) -> None:
    """Cues: an error's number; `half` and the connection ends; `slow`, in small pieces; `more` or `fewer` bytes than HEAD says;
    `chunked`, without a length; `elsewhere`, another part than the one that was asked for; `unnamed`, a part that
    does not say of which version it is. Words may be joined.
    """
    words = self.world.cues.get(self.path, [''])
    self._answer(words.pop(0) if words[1:] else words[0])

  def _answer(self, cue: str) -> None:
    world, path = self.world, self.path
    world.asked.append((self.command, path, self.headers.get('Range', '')))
    if target := world.redirects.get(path):
      return self._empty(302, {'Location': target})
    if path not in world.files:
      return self._empty(404)
    if cue.isdigit():
      return self._empty(int(cue), world.headers_of_errors)
    content = world.files[path]
    digest = hashlib.sha1(content).hexdigest()
    version = f'"{digest}"' if world.versions == 'ETag' else f'Sat, 28 Nov 2026 {int(digest, 16) % 24:02}:00:00 GMT'
    first, code, headers = 0, 200, world.headers | ({world.versions: version} if world.versions else {})
    asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
    if asked and world.ranges and self.headers.get('If-Range', version) == version:
      first, code = int(asked[1]), 206
      if first >= len(content):
        return self._empty(416)
      first += 'elsewhere' in cue
      if 'unnamed' in cue:
        headers.pop(world.versions)
      headers['Content-Range'] = f'bytes {first}-{len(content) - 1}/{len(content)}'
    body = content[first:] + b'?' * ('more' in cue)
    length = len(body) - ('fewer' in cue)
    self.send_response(code)
    for name, text in headers.items():
      self.send_header(name, text)
    if 'chunked' in cue:
      self.send_header('Transfer-Encoding', 'chunked')
    else:
      self.send_header('Content-Length', str(length))
    self.end_headers()
    if self.command == 'GET':
      self._send(body[:length], cue)

  def _send(self, body: bytes, cue: str) -> None:
    if 'chunked' in cue:
      self.wfile.write(b'%x\r\n%b\r\n0\r\n\r\n' % (len(body), body))
    elif 'half' in cue:
      self.wfile.write(body[:len(body) // 2])
      self.close_connection = True
    elif 'slow' in cue:
      for start in range(0, len(body), 1000):
        self.wfile.write(body[start:start + 1000])
        time.sleep(0.02)
    else:
      self.wfile.write(body)

  def _empty(self, code: int, headers: dict[str, str] | None = None) -> None:
    self.send_response(code)
    for name, text in {'Content-Length': '0', **(headers or {})}.items():
      self.send_header(name, text)
    self.end_headers()
