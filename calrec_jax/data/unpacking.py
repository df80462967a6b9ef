"""Files of lines read once: threads unpack and count them, beside what reads them piece by piece from the disk.

A few pieces of each file lie on the disk at a time, and none in memory.
"""

import contextlib
import hashlib
import itertools
import pathlib
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError

_PIECE_BYTES = 1 << 26
_LOOK_S = 0.2  # between looks whether anyone still reads


class Unpacking:
  """One file on its way. Iterating yields the path of each piece of whole lines, which goes when the next one is asked for.

  After the last piece `source` is what `json_lines.inspect` returns. A file that is not gzipped is one piece, itself.
  """

  def __init__(self, path: pathlib.Path, folder: pathlib.Path, stopped: threading.Event, *, progress: bool):
    self.path, self.source = path, None
    self._folder, self._stopped, self._progress = folder, stopped, progress
    self._pieces: queue.Queue[pathlib.Path | Exception | None] = queue.Queue(maxsize=1)

  def __iter__(self) -> Iterator[pathlib.Path]:
    """Raises UserError as `json_lines.inspect`, or where there is no room for a piece."""
    while (piece := self._pieces.get()) is not None:
      if isinstance(piece, Exception):
        raise piece
      yield piece
      piece.unlink()

  def run(self) -> None:
    """Unpacks the file, in a thread of its own, until its end or until nobody reads any more."""
    try:
      sha256, gzipped = hashlib.sha256(), json_lines.is_gzipped(json_lines.file_at(self.path))
      blocks = json_lines.blocks(self.path, sha256=sha256, progress=self._progress)
      n_lines = self._write(blocks) if gzipped else self._link(blocks)
      self.source = json_lines.Source(self.path, sha256.hexdigest(), n_lines, gzipped)
      self._hand_over(None)
    except Exception as error:
      self._hand_over(error)

  def _link(self, blocks: Iterator[tuple[bytes, int]]) -> int:
    piece = self._folder / 'whole'
    piece.symlink_to(self.path.absolute())  # a name that is no pattern for what reads it
    self._hand_over(piece)
    return sum(n_filled for _, n_filled in itertools.takewhile(lambda _: not self._stopped.is_set(), blocks))

  def _write(self, blocks: Iterator[tuple[bytes, int]]) -> int:
    n_lines, number, block = 0, 0, next(blocks, None)
    while block is not None and not self._stopped.is_set():
      piece = self._folder / str(number)
      try:
        with piece.open('wb') as file:
          while block is not None and file.tell() < _PIECE_BYTES and not self._stopped.is_set():
            file.write(block[0])
            n_lines += block[1]
            block = next(blocks, None)
      except OSError as error:
        raise UserError(f'{self._folder}: {self.path.name} cannot be unpacked there ({error.strerror}); make room, or choose '
                        'another --tmp_dir.') from error
      self._hand_over(piece)
      number += 1
    return n_lines

  def _hand_over(self, piece: pathlib.Path | Exception | None) -> None:
    while not self._stopped.is_set():
      with contextlib.suppress(queue.Full):
        self._pieces.put(piece, timeout=_LOOK_S)
        return


@contextlib.contextmanager
def unpack(paths: Sequence[pathlib.Path], work: pathlib.Path, *, threads: int, progress: bool = True
           ) -> Iterator[list[Unpacking]]:
  """Unpacks files, so many at a time and the first ones first; they are to be read in their order.

  Args:
    paths: of the files, gzipped or not.
    work: a folder for the pieces.
    threads: how many files are unpacked at a time.
    progress: whether to show progress on stderr.
  """
  stopped = threading.Event()
  with tempfile.TemporaryDirectory(prefix='unpacked.', dir=work) as folder, futures.ThreadPoolExecutor(threads) as pool:
    files = []
    for number, path in enumerate(paths):
      place = pathlib.Path(folder, str(number))
      place.mkdir()
      files.append(Unpacking(path, place, stopped, progress=progress))
      pool.submit(files[-1].run)
    try:
      yield files
    finally:
      stopped.set()
