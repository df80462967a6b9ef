"""TensorFlow without the lines that it writes before it reads any log level."""

import os
import tempfile


def load() -> None:
  """Imports what SeqIO will need, without the lines that TensorFlow's C++ writes to stderr before it reads any log level."""
  with tempfile.TemporaryFile() as unread:
    stderr = os.dup(2)
    os.dup2(unread.fileno(), 2)
    try:
      import seqio  # noqa: F401
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
