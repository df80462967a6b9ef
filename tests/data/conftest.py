"""What the tests of downloads share."""

import pytest

from calrec_jax.data import http_files


@pytest.fixture
def no_waits(monkeypatch):
  """Lost connections are taken up again at once, and this machine's servers are reached without a proxy."""
  monkeypatch.setattr(http_files, 'FIRST_WAIT_SECONDS', 0.)
  monkeypatch.setenv('no_proxy', '127.0.0.1')
