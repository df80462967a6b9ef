"""Outputs appear whole or not at all, also when the disk is full or somebody interrupts."""

import errno
import json

import pytest

from calrec_jax import outputs
from calrec_jax.errors import UserError


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit, OSError(errno.ENOSPC, 'No space left on device')])
def test_nothing_is_left_of_what_was_not_finished(tmp_path, error):
  with pytest.raises(error if isinstance(error, type) else type(error)):
    with outputs.new_folder(tmp_path / 'folder') as scratch:
      (scratch / 'half').write_text('half')
      raise error
  with pytest.raises(error if isinstance(error, type) else type(error)):
    with outputs.new_file(tmp_path / 'file') as scratch:
      scratch.write_text('half')
      raise error
  assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_given(tmp_path):
  (tmp_path / 'out').mkdir()
  with outputs.new_folder(tmp_path / 'out') as scratch:
    (scratch / 'a').write_text('a')
    assert list((tmp_path / 'out').iterdir()) == []
  assert (tmp_path / 'out/a').read_text() == 'a'
  assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('out', ['', '.', '../out'])
def test_the_folder_in_which_this_runs_is_no_output(tmp_path, monkeypatch, out):
  (tmp_path / 'out').mkdir()
  monkeypatch.chdir(tmp_path / 'out')
  with pytest.raises(UserError, match='the folder in which this runs'), outputs.new_folder(out):
    pass
  assert list(tmp_path.iterdir()) == [tmp_path / 'out'] and not any((tmp_path / 'out').iterdir())


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_what_is_in_use_is_refused_and_kept(tmp_path, kind):
  out = tmp_path / 'out'
  if kind == 'folder':
    out.mkdir()
  (out / 'mine' if kind == 'folder' else out).write_text('mine')
  with pytest.raises(UserError, match='in use'), outputs.new_folder(out):
    raise AssertionError('not entered')
  assert (out / 'mine' if kind == 'folder' else out).read_text() == 'mine'


def test_a_file_is_replaced_in_one_go(tmp_path):
  outputs.write_json(tmp_path / 'deep/x.json', {'a': 1})
  with outputs.new_file(tmp_path / 'deep/x.json') as scratch:
    scratch.write_text('2')
    assert json.loads((tmp_path / 'deep/x.json').read_text()) == {'a': 1}
  assert (tmp_path / 'deep/x.json').read_text() == '2'
  assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['x.json']


def test_json_is_readable_text(tmp_path):
  outputs.write_json(tmp_path / 'x.json', {'é': [1, 2.5, None]})
  text = (tmp_path / 'x.json').read_text(encoding='utf-8')
  assert 'é' in text and text.endswith('}\n') and json.loads(text) == {'é': [1, 2.5, None]}


def test_a_place_below_a_file(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be written'), outputs.new_folder(tmp_path / 'file/out'):
    pass
  assert (tmp_path / 'file').read_text() == ''
