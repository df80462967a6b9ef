"""docs/fidelity.md against the code: every setting that it names exists, with the default that it gives."""

import ast
import inspect
import pathlib
import re

from calrec_jax import cli, configurables

PAGE = pathlib.Path(__file__).resolve().parents[1] / 'docs/fidelity.md'


def _rows(text: str) -> list[tuple[str, str]]:
  """(setting, default) of each row of the tables of facts, where a default is given."""
  cells = [re.split(r'(?<!\\)\|', line)[1:-1] for line in text.splitlines() if line.startswith('|')]
  return [(row[2].strip(), row[3].strip()) for row in cells if len(row) == 4 and row[3].strip().startswith('`')]


def _gin_default(name: str) -> object:
  owner, parameter = name.split('.')
  default = inspect.signature(configurables.CONFIGURABLES[owner]).parameters[parameter].default
  assert default is not inspect.Parameter.empty, f'{name} has no default'
  return default


def _flag_default(command: str) -> object:
  *verbs, flag = command.split()[1:]
  parser = cli.parser()
  for verb in verbs:
    parser = next(action.choices[verb] for action in parser._actions if isinstance(action.choices, dict))
  return parser.get_default(flag.removeprefix('--'))


def wrong_rows(text: str) -> list[str]:
  wrong = []
  for setting, default in _rows(text):
    name = re.findall('`([^`]+)`', setting)[-1]
    real = _flag_default(name) if name.startswith('calrec ') else _gin_default(name)
    if ast.literal_eval(default.strip('`')) != real:
      wrong.append(f'{name}: the page says {default}, the code {real!r}')
  return wrong


def test_the_page_gives_the_defaults_of_the_code():
  text = PAGE.read_text(encoding='utf-8')
  assert len(_rows(text)) >= 20
  assert wrong_rows(text) == []


def test_a_default_that_drifted_is_noticed():
  text = PAGE.read_text(encoding='utf-8').replace('`0.125`', '`0.25`').replace('`3` |', '`4` |')
  assert [row.split(':')[0] for row in wrong_rows(text)] == ['calrec prepare dumps --min_length', 'objective.alpha']


def test_every_name_of_the_page_exists():
  text = PAGE.read_text(encoding='utf-8')
  names = set(re.findall(r'`([a-z]\w*\.[a-z]\w*)`', text))
  for name in names:
    _gin_default(name)
  macros = set(re.findall(r'`([A-Z][A-Z0-9]*_[A-Z0-9_]+)`', text))
  files = ''.join(path.read_text() for path in (PAGE.parents[1] / 'gin/runs').glob('*.gin'))
  assert {name for name in macros if f'{name} = ' not in files} == set()
