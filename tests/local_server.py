"""An HTTP server on this machine, as a context: the base of what stands in for servers elsewhere."""

import http.server
import threading
from typing import Self


class LocalServer:
  """Serves requests with a handler class, which knows this object as its `world`; `url` is where."""

  def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]):
    self._server = _Server(('127.0.0.1', 0), type('Handler', (handler,), {'world': self}))
    self.url = f'http://127.0.0.1:{self._server.server_port}'

  def __enter__(self) -> Self:
    threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._server.shutdown()
    self._server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
  """One request, of which nothing is written down."""

  protocol_version = 'HTTP/1.1'

  def log_message(self, *_: object) -> None:
    pass


class _Server(http.server.ThreadingHTTPServer):
  """Says nothing of connections that the other side closed."""

  daemon_threads = True

  def handle_error(self, *_: object) -> None:
    pass
