"""The commands of docs/data.md that one machine can run; on Beam, with two processes, they give what they give without it."""

import filecmp
import os
import pathlib
import re
import shlex

import pytest
import seqio
from tfds_files import files, prepare

from calrec_jax import cli
from calrec_jax.tasks import registry
from calrec_jax.text.vocabularies import load_vocabulary

PAGE = pathlib.Path(__file__).resolve().parents[1] / 'docs/data.md'
DATA = 'data/garden_tools'


def blocks(language: str) -> list[str]:
  found = re.findall(r'^```(\w*)\n(.*?)^```', PAGE.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE)
  return [text for name, text in found if name == language]


def commands(text: str) -> list[list[str]]:
  """The words of each line; a line goes on behind a backslash, and in quotes."""
  return [shlex.split(line) for line in re.findall(r"(?:'[^']*'|[^'\n])+", text.replace('\\\n', ' '))]


@pytest.fixture(scope='module')
def guided(tmp_path_factory):
  """A folder in which the page's commands have run, those on Beam left out."""
  folder = tmp_path_factory.mktemp('guide')
  before = pathlib.Path.cwd()
  os.chdir(folder)
  try:
    for words in (words for block in blocks('bash') for words in commands(block)):
      if not any(word.startswith('--beam') for word in words):
        assert words[0] == 'calrec' and cli.main(words[1:]) == 0, words
  finally:
    os.chdir(before)
  return folder


def test_the_commands_of_the_page(guided):
  assert {path.name for path in guided.iterdir()} >= {'downloads', 'data', 'cache'}
  assert (guided / 'cache/garden_tools/COMPLETED').exists()


def test_each_command_of_the_page_is_one():
  told = [words for block in [*blocks('bash'), *blocks('')] for words in commands(block) if words[0] == 'calrec']
  options = [cli.parser().parse_args(words[1:]) for words in told]
  runners = [re.search(r'--runner=(\w+)', each.beam)[1] for each in options if each.verb == 'cache' and each.beam]
  assert runners == ['FnApiRunner', 'DataflowRunner', 'FlinkRunner', 'SparkRunner']


@pytest.mark.beam
def test_each_runner_of_the_page_and_its_options_are_beam_s():
  from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
  for text in re.findall(r"--beam='([^']*)'", PAGE.read_text(encoding='utf-8')):
    flags = shlex.split(text)
    options = PipelineOptions(flags)
    assert options.view_as(StandardOptions).runner in StandardOptions.KNOWN_RUNNER_NAMES
    assert options.get_all_options().keys() >= {flag.removeprefix('--').partition('=')[0] for flag in flags}


@pytest.mark.beam
def test_the_tfds_view_of_two_processes_is_that_of_one(guided, monkeypatch):
  monkeypatch.chdir(guided)
  [code] = blocks('python')
  more = code.replace('beam_options=options', 'beam_options=options, num_shards=3').replace("'tfds'", "'tfds3'")
  assert more != code
  names: dict = {}
  exec(compile(more, str(PAGE), 'exec'), names)
  plain = prepare(DATA, 'plain', num_shards=3)
  assert files(names['builder']) == files(plain) and len(files(plain)) == 9
  orders = [[row['user_id'] for row in builder.as_dataset(split='train').as_numpy_iterator()]
            for builder in (names['builder'], plain)]
  assert orders[0] == orders[1] and len(orders[0]) > 250


@pytest.mark.beam
def test_the_cache_of_two_processes_is_that_of_one(guided, monkeypatch):
  monkeypatch.chdir(guided)
  [words] = [words for block in blocks('bash') for words in commands(block) if any('--beam' in word for word in words)]
  assert cli.main(words[1:]) == 0
  names = sorted(path.name for path in pathlib.Path('cache/garden_tools').iterdir())
  assert filecmp.cmpfiles('cache/garden_tools', 'cache_by_beam/garden_tools', names, shallow=False)[0] == names
  assert sorted(path.name for path in pathlib.Path('cache_by_beam/garden_tools').iterdir()) == names
  assert os.listdir('cache_by_beam') == ['garden_tools']
  registry.register('data', load_vocabulary('data/vocabulary.json'))
  task = seqio.get_mixture_or_task('garden_tools')
  monkeypatch.setattr(seqio.utils, '_GLOBAL_CACHE_DIRECTORIES', [str(guided / 'cache_by_beam')])
  read = [[row['targets_pretokenized'] for row in task.get_dataset(None, 'test', use_cached=use_cached, shuffle=False
                                                                   ).as_numpy_iterator()] for use_cached in (True, False)]
  assert read[0] == read[1] and len(read[0]) == 300
