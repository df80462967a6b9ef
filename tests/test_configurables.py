"""Gin at the edge: every shipped file parses, every name is known, and what gin passes over in silence is an error."""

import inspect
import pathlib
import re

import gin
import pytest
import tiny

from calrec_jax import cli, configurables
from calrec_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'gin').rglob('*.gin') if path.parent.name != 't5x')
T5X_FILES = sorted((ROOT / 'gin/t5x').glob('*.gin'))  # T5X reads them, and its own that they include
GIVEN = {'MODEL_DIR': 'm', 'DATA_DIR': 'd', 'VOCABULARY': 'v', 'TRAIN_STEPS': 7, 'MIXTURE_OR_TASK_NAME': 't',
         'INITIAL_CHECKPOINT_PATH': 'i', 'CHECKPOINT_PATH': 'c', 'INFER_OUTPUT_DIR': 'o', 'EVAL_OUTPUT_DIR': 'e'}


@pytest.fixture(autouse=True)
def clean():
  yield
  gin.clear_config()


def parse(*files: str, **macros) -> None:
  configurables.parse([f'gin/{file}.gin' for file in files], [], [f'{name}={value!r}' for name, value in macros.items()])


def required(*files: str) -> list[str]:
  """The macros that the files ask for."""
  try:
    parse(*files)
  except UserError as error:
    return re.match(r'([A-Z_, ]+): required', str(error))[1].split(', ')
  return []


def stage_of(file: str) -> str:
  return 'gin/runs/stage2.gin' if 'stage2' in file or 'paper' in file else 'gin/runs/stage1.gin'


@pytest.mark.parametrize('file', FILES)
def test_every_file_parses_with_its_required_macros(file):
  files = [file] if file.startswith('gin/runs/') and 'paper' not in file else [stage_of(file), file]
  names = [name.removeprefix('gin/').removesuffix('.gin') for name in files]
  asked = required(*names)
  parse(*names, **{name: GIVEN[name] for name in asked})
  header = (ROOT / file).read_text().partition('\n\n')[0]
  for name in asked if file.startswith('gin/runs/') and 'paper' not in file else ():
    assert name in header, f'{file} requires {name} and does not say so'


def t5x_macros(path: pathlib.Path) -> dict[str, str]:
  """Each macro that a file of gin/t5x, or one that it includes, sets: as text, the last one wins."""
  text = path.read_text()
  included = re.findall("^include '(gin/.*)'", text, re.M)
  values = {name: value for file in included for name, value in t5x_macros(ROOT / file).items()}
  return values | dict(re.findall(r'^([A-Z][A-Z0-9_]*) = (.*)$', text, re.M))


@pytest.mark.parametrize('path', T5X_FILES, ids=lambda path: path.stem)
def test_files_of_t5x_say_what_they_require(path):
  asked = {name for name, value in t5x_macros(path).items() if value == '%gin.REQUIRED'}
  header = re.match(r'(#.*\n)*', path.read_text())[0].partition('Commonly overridden')[0]
  assert {'DATA_DIR', 'VOCABULARY'} <= asked and [name for name in asked if name not in header] == []


def test_the_shipped_files_are_found():
  assert [path.stem for path in T5X_FILES] == ['eval', 'infer', 'model', 'stage1', 'stage2']

  assert {'gin/runs/paper.gin', 'gin/runs/stage1.gin', 'gin/runs/stage2.gin', 'gin/runs/infer.gin', 'gin/runs/evaluate.gin',
          'gin/models/tiny.gin'} <= set(FILES)
  ablations = ('no_contrastive', 'no_tt', 'no_ut', 'stage1_only', 'stage2_only')
  assert {f'gin/ablations/{name}.gin' for name in ablations} <= set(FILES)


def test_stage_two_shares_what_it_does_not_change():
  parse('runs/stage1', MODEL_DIR='m', DATA_DIR='d', VOCABULARY='v', TRAIN_STEPS=7)
  first = macros()
  parse('runs/stage2', **{name: GIVEN[name] for name in required('runs/stage2')})
  second = macros()
  assert {name for name in first if first[name] != second[name]} == {
      'MIXTURE_OR_TASK_NAME', 'INITIAL_CHECKPOINT_PATH', 'LEARNING_RATE'}


def macros() -> dict[str, object]:
  return {scope: values['value'] for (scope, selector), values in gin.config._CONFIG.items() if selector == 'gin.macro'}


def test_later_files_and_bindings_win(tmp_path):
  (tmp_path / 'mine.gin').write_text('BATCH_SIZE = 3\nTRAIN_STEPS = 5\n')
  given = [f'{name}={GIVEN[name]!r}' for name in ('MODEL_DIR', 'DATA_DIR', 'VOCABULARY')]
  files = ['gin/runs/stage1.gin', str(tmp_path / 'mine.gin')]
  configurables.parse(files, [], given)
  assert (macros()['BATCH_SIZE'], macros()['TRAIN_STEPS']) == (3, 5)
  configurables.parse(files, [], [*given, 'BATCH_SIZE=4'])
  assert (macros()['BATCH_SIZE'], macros()['TRAIN_STEPS']) == (4, 5)
  with pytest.raises(UserError, match='TRAIN_STEPS: required'):  # of this call alone: nothing is left of the last one
    configurables.parse(files[:1], [], given)


@pytest.mark.parametrize('binding, words', [
    ('optimiser.b1=0.5', "'optimizer'"), ('optimizer.beta1=0.5', 'beta1'), ('BATCHSIZE=4', "'BATCH_SIZE'"),
    ('BATCH_SIZE=[4', 'BATCH_SIZE'), ('MODEL_DIR=runs/x', 'quotes'), ('optimizer.b1=%B1', 'B1: required'),
    ('train.rows=@row()', "'rows'"), ('=4', '=4'), ("include 'x'='y'", 'include')])
def test_wrong_bindings_are_told_in_one_line(binding, words):
  with pytest.raises(UserError) as raised:
    configurables.parse(['gin/runs/stage1.gin'], [],
                        [*(f'{name}={GIVEN[name]!r}' for name in required('runs/stage1')), binding])
  assert words in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize('text', [
    'TRAIN_STEPS == 5', 'train.steps = 4', 'x = [', "include 'nowhere.gin'", 'import nothing_here'])
def test_a_wrong_file_is_named(tmp_path, text):
  (tmp_path / 'wrong.gin').write_text(text + '\n')
  with pytest.raises(UserError, match=f'--gin_file={tmp_path / "wrong.gin"}: ') as raised:
    configurables.parse([str(tmp_path / 'wrong.gin')], [], [])
  assert '\n' not in str(raised.value)


def test_every_documented_option_is_an_argument():
  """The headers of the gin files name options that are there."""
  for file in FILES:
    header = re.match(r'(#.*\n)*', (ROOT / file).read_text())[0]
    for name, option in re.findall(r'\b([a-z0-9_]+)\.([a-z_0-9]+)\b(?!\.gin)', header):
      if name in configurables.CONFIGURABLES:
        assert option in inspect.signature(configurables.CONFIGURABLES[name]).parameters, f'{file}: {name}.{option}'


def test_the_record_of_a_run_runs_again(tiny_store, tmp_path):
  """config.gin, which a run leaves behind, is a gin file that gives the same run."""
  assert cli.main(tiny.gin_arguments(tiny_store, 'stage1', tmp_path / 'one', '--gin.schedule.eval_histories=8')) == 0
  record = tmp_path / 'one/config.gin'
  assert cli.main(['train', f'--gin_file={record}', f"--gin.MODEL_DIR='{tmp_path / 'two'}'"]) == 0
  assert tiny.scalars(tmp_path / 'one', 'train/loss') == tiny.scalars(tmp_path / 'two', 'train/loss')
  assert tiny.scalars(tmp_path / 'one', 'validation') == tiny.scalars(tmp_path / 'two', 'validation')
