"""Names of TPU slices, and what is said where one does not exist."""

import importlib.metadata
import importlib.util

import pytest

from calrec_jax.errors import UserError
from calrec_jax.plan import topology
from calrec_jax.plan.chips import CHIPS
from calrec_jax.plan.topology import Topology


@pytest.mark.parametrize('text, chips', [
    ('v5e:2x4', 8), ('v5e:4x8*2', 64), ('v4:2x2x4', 16), ('v5p:4x4x8', 128), ('v6e:16x16', 256)])
def test_a_name_says_chip_shape_and_slices(text, chips):
  found = topology.parse(text)
  assert str(found) == text and found.chips == chips


@pytest.mark.parametrize('text, words', [
    ('v5e', 'CHIP:SHAPE'), ('v5e:', 'CHIP:SHAPE'), ('v5e:4x', 'CHIP:SHAPE'), ('v9:2x4', "unknown chip 'v9'"),
    ('v5e:2x2x2', '2 dimensions'), ('v5p:4x4', '3 dimensions'), ('v5e:32x16', 'at most 256'), ('v5e:0x4', '2 dimensions'),
    ('v5e:2x4*0', '2 dimensions')])
def test_wrong_names_are_told_in_one_line(text, words):
  with pytest.raises(UserError) as raised:
    topology.parse(text)
  assert words in str(raised.value) and '\n' not in str(raised.value)


def test_slices_grow_to_the_largest():
  found, sizes = Topology(CHIPS['v5e'], (2, 4)), []
  while found:
    sizes.append(found.shape)
    found = topology.larger(found)
  assert sizes == [(2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
  assert topology.larger(Topology(CHIPS['v5p'], (2, 2, 4))).shape == (2, 4, 4)


@pytest.mark.parametrize('missing, words', [(True, 'not installed'), (False, 'does not belong to jax')])
def test_libtpu_is_missing_or_another_one(monkeypatch, missing, words):
  version = importlib.metadata.version
  if missing:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.0.9' if name == 'libtpu' else version(name))
  with pytest.raises(UserError, match=words) as raised:
    topology._library()
  assert "pip install 'jax[tpu]'" in str(raised.value)


def test_every_chip_has_a_peak():
  assert all(chip.flops > 1e14 for chip in CHIPS.values())
