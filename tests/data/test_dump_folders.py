"""A folder of dumps: which files are whose, each category made once, and going on after a stop."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import refusals

from calrec_jax import cli
from calrec_jax.data import amazon, dump_folders, histories
from calrec_jax.errors import UserError

NAMES = {'Video_Games_5.json.gz': 'meta_Video_Games.json.gz', 'Books.jsonl.gz': 'meta_Books.jsonl.gz',
         'reviews_Office_Products_5.json.gz': 'meta_Office_Products.json.gz', 'ratings_Toys.csv': None,
         'Movies_and_TV.csv.gz': None}


def test_files_are_known_by_their_published_names(tmp_path):
  for name in [*NAMES, *filter(None, NAMES.values()), 'README.md', 'meta_Nobody.json.gz', 'Books.train.csv.gz', 'notes.txt',
               'store.json']:
    (tmp_path / name).touch()
  (tmp_path / 'oracle').mkdir()
  found = dump_folders.find(tmp_path)
  assert found == {category: (str(tmp_path / name), [str(tmp_path / NAMES[name])] if NAMES[name] else [])
                   for category, name in (('Books', 'Books.jsonl.gz'), ('Movies_and_TV', 'Movies_and_TV.csv.gz'),
                                          ('Office_Products', 'reviews_Office_Products_5.json.gz'),
                                          ('Toys', 'ratings_Toys.csv'), ('Video_Games', 'Video_Games_5.json.gz'))}
  assert list(dump_folders.find(tmp_path, ['toys', 'Books'])) == ['Books', 'Toys']
  refusals.refused(lambda: dump_folders.find(tmp_path, ['nobody']), 'no reviews of nobody', 'Books, Movies_and_TV')
  (tmp_path / 'Books.csv').touch()
  refusals.refused(lambda: dump_folders.find(tmp_path), 'Books.csv and Books.jsonl.gz of one category', '--reviews')


def test_folders_that_hold_no_dumps(tmp_path):
  refusals.refused(lambda: dump_folders.find(tmp_path), 'holds no reviews')
  refusals.refused(lambda: dump_folders.find(tmp_path / 'none'), 'no such folder')
  (tmp_path / 'file').touch()
  refusals.refused(lambda: dump_folders.find(tmp_path / 'file'), 'is a file, not a folder')
  for name in ('TOYS.csv', 'Toys.csv'):
    (tmp_path / name).touch()
  refusals.refused(lambda: list(dump_folders.prepare(tmp_path, tmp_path / 'out')), 'would be called toys')


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """Dumps of three generated categories."""
  folder = tmp_path_factory.mktemp('folders') / 'store'
  assert cli.main(['synthesize', '--out', str(folder), '--users', '60', '--items', '30', '--categories', '3']) == 0
  return folder


def test_a_stopped_call_goes_on_and_makes_what_single_calls_make(store, tmp_path, monkeypatch, caplog):
  names = [category.lower() for category in dump_folders.find(store)]
  whole, write = amazon.histories.write, iter([None, None])

  def stops(*arguments):
    if next(write, 'stop'):
      raise KeyboardInterrupt
    return whole(*arguments)
  monkeypatch.setattr(amazon.histories, 'write', stops)
  with pytest.raises(KeyboardInterrupt):
    list(dump_folders.prepare(store, tmp_path / 'data', min_count=4, progress=False))
  monkeypatch.undo()
  assert sorted(path.name for path in (tmp_path / 'data').iterdir()) == names[:2]
  caplog.set_level('INFO')
  made = list(dump_folders.prepare(store, tmp_path / 'data', min_count=4, progress=False))
  assert [description['name'] for description in made] == names and caplog.text.count('nothing is done') == 2
  for category, (reviews, meta) in dump_folders.find(store).items():
    amazon.prepare_dumps([reviews], meta, name=category.lower(), out=tmp_path / 'single' / category, min_count=4,
                         progress=False)
    for file in (tmp_path / 'single' / category).iterdir():
      assert file.read_bytes() == (tmp_path / 'data' / category.lower() / file.name).read_bytes()
  with pytest.raises(UserError, match='already in use'):
    list(dump_folders.prepare(store, tmp_path / 'data', min_count=5, progress=False))


def test_killed_at_any_moment_and_started_again(store, tmp_path):
  command = [sys.executable, '-m', 'calrec_jax.cli', 'prepare', 'dumps', '--dumps', str(store), '--out']
  assert cli.main([*command[3:], str(tmp_path / 'whole')]) == 0
  for seconds in (0.6, 0.9, 1.2):
    with subprocess.Popen([*command, str(tmp_path / 'killed')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                          ) as process:
      time.sleep(seconds)
      process.kill()
    for folder in (tmp_path / 'killed').glob('[a-z]*'):
      histories.load(folder)  # whole
  assert cli.main([*command[3:], str(tmp_path / 'killed')]) == 0
  whole = {path.relative_to(tmp_path / 'whole'): path.read_bytes() for path in (tmp_path / 'whole').rglob('*.*z')}
  assert len(whole) == 6 and all((tmp_path / 'killed' / name).read_bytes() == content for name, content in whole.items())


def test_a_full_disk_is_told_and_leaves_what_was_there(store, tmp_path):
  category = next(iter(dump_folders.find(store)))
  command = ['prepare', 'dumps', '--dumps', str(store), '--out', str(tmp_path / 'data')]
  assert cli.main([*command, '--categories', category]) == 0
  before = {path: path.read_bytes() for path in (tmp_path / 'data').rglob('*.*')}
  limited = ('import resource, sys\nfrom calrec_jax import cli\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n'
             'sys.exit(cli.main(sys.argv[1:]))')
  done = subprocess.run([sys.executable, '-c', limited, *command], capture_output=True, text=True, check=False)
  assert done.returncode == 2 and '--tmp_dir' in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr, done.stderr
  assert before == {path: path.read_bytes() for path in (tmp_path / 'data').rglob('*.*')}


def test_the_command_line(store, tmp_path, capsys, caplog):
  caplog.set_level('INFO')
  first, *others = dump_folders.find(store)
  command = ['prepare', 'dumps', '--dumps', str(store), '--out', str(tmp_path / 'data')]
  assert cli.main([*command, '--categories', first]) == 0
  out = capsys.readouterr().out
  assert first.lower() in out and f'{histories.load(tmp_path / "data" / first.lower()).fingerprint[:12]}' in out
  assert not any(other.lower() in out for other in others)
  assert cli.main([*command, '--json']) == 0
  assert [found['name'] for found in json.loads(capsys.readouterr().out)] == sorted(name.lower() for name in (first, *others))
  assert caplog.text.count('nothing is done') == 1
  shutil.rmtree(tmp_path / 'data' / first.lower())
  for more in (['--name', 'x'], ['--reviews', 'x'], ['--meta', 'x']):
    assert cli.main([*command, *more]) == 2
    assert 'leave out' in capsys.readouterr().err
  for wrong in ([], ['--reviews', 'x'], ['--reviews', 'x', '--name', 'y', '--categories', 'z']):
    assert cli.main(['prepare', 'dumps', '--out', str(tmp_path / 'x'), *wrong]) == 2
    assert '--dumps' in capsys.readouterr().err
