"""What the wheel ships: the package with its tasks, types and gin files, and no more."""

import ast
import importlib.metadata
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _build(folder: pathlib.Path, mutate=lambda setup: setup) -> pathlib.Path:
  """Builds a wheel of a copy of the checkout (setuptools writes beside its sources); returns the wheel's path."""
  source = folder / 'source'
  ignore = shutil.ignore_patterns('__pycache__', '*.egg-info')
  for name in ('calrec_jax', 'gin'):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    if (ROOT / name).exists():
      shutil.copy(ROOT / name, source)
  (source / 'setup.py').write_text(mutate((ROOT / 'setup.py').read_text()))
  subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation',
                  '--disable-pip-version-check', '--wheel-dir', folder, source], check=True, cwd=folder)
  return next(folder.glob('*.whl'))


def _wanted() -> set[str]:
  files = [*(path for kind in ('py', 'css', 'js') for path in (ROOT / 'calrec_jax').rglob(f'*.{kind}')),
           ROOT / 'calrec_jax/py.typed']
  gin = {f'calrec_jax/{path.relative_to(ROOT).as_posix()}' for path in (ROOT / 'gin').rglob('*.gin')}
  return {path.relative_to(ROOT).as_posix() for path in files} | gin


def _shipped(wheel: pathlib.Path) -> set[str]:
  return {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> pathlib.Path:
  return _build(tmp_path_factory.mktemp('wheel'))


def test_the_wheel_ships_the_package_and_the_gin_files_and_nothing_else(wheel):
  assert _shipped(wheel) == _wanted()
  assert {'calrec_jax/gin/runs/stage1.gin', 'calrec_jax/tasks/__init__.py', 'calrec_jax/py.typed'} <= _shipped(wheel)


@pytest.mark.parametrize('cut', [": ['*.gin']", ' + list(GIN)'])
def test_a_setup_that_forgets_something_is_noticed(tmp_path, cut):
  replaced = {": ['*.gin']": ': []'}.get(cut, '')
  broken = _build(tmp_path, lambda setup: setup.replace(cut, replaced))
  assert _shipped(broken) < _wanted()


def test_the_metadata_names_the_command_the_licence_and_the_python(wheel):
  archive = zipfile.ZipFile(wheel)
  info = {name.rpartition('/')[2]: archive.read(name).decode() for name in archive.namelist() if '.dist-info/' in name}
  assert 'calrec = calrec_jax.cli:main' in info['entry_points.txt']
  assert 'Requires-Python: >=3.11' in info['METADATA']
  assert 'Apache License' in info['LICENSE']
  version = re.search(r'^Version: (.+)$', info['METADATA'], re.M)[1]
  assert version == re.search(r"__version__ = '(.+)'", (ROOT / 'calrec_jax/__init__.py').read_text())[1]


def test_an_installed_wheel_answers_from_any_folder(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / 'site')
  env = dict(os.environ, PYTHONPATH=str(tmp_path / 'site'))
  where = [sys.executable, '-c', 'import calrec_jax; print(calrec_jax.__file__)']
  found = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
  assert found.startswith(str(tmp_path / 'site'))
  done = subprocess.run([sys.executable, '-m', 'calrec_jax.cli', '--help'], cwd=tmp_path, env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0 and 'train' in done.stdout, done.stderr


def _declared() -> dict:
  """The arguments of setup(), as setup.py gives them."""
  arguments, real_setup, folder = {}, setuptools.setup, pathlib.Path.cwd()
  setuptools.setup = arguments.update
  os.chdir(ROOT)
  try:
    runpy.run_path(str(ROOT / 'setup.py'))
  finally:
    setuptools.setup = real_setup
    os.chdir(folder)
  return arguments


def _normal(name: str) -> str:
  return re.sub('[-_.]+', '-', re.match(r'[\w.-]+', name)[0]).lower()


def undeclared(sources: dict[str, str], declared: set[str]) -> set[str]:
  """The distributions imported at the top of a module that setup.py does not ask for."""
  found, owners = set(), importlib.metadata.packages_distributions()
  for source in sources.values():
    for node in ast.parse(source).body:
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      for top in {name.split('.')[0] for name in names} - set(sys.stdlib_module_names) - {'calrec_jax'}:
        if not {_normal(owner) for owner in owners.get(top, [top])} & declared:
          found.add(top)
  return found


def test_every_import_is_asked_for():
  # seqio cannot work without tensorflow, and says so through tensorflow-text.
  declared = {_normal(name) for name in _declared()['install_requires']} | {'tensorflow', 'jaxlib'}
  sources = {path.name: path.read_text() for path in (ROOT / 'calrec_jax').rglob('*.py')}
  assert undeclared({'t5x_model.py': sources.pop('t5x_model.py')}, declared) <= {'t5x'}  # which only T5X imports
  assert undeclared(sources, declared) == set()
  assert undeclared({'a.py': 'import torch\nimport os\n'}, declared) == {'torch'}


def test_only_one_module_imports_t5x():
  importing = [path.name for path in (ROOT / 'calrec_jax').rglob('*.py')
               if re.search(r'^\s*(import|from) (t5x|airio|jestimator)\b', path.read_text(), re.M)]
  naming = [path.name for path in (ROOT / 'calrec_jax').rglob('*.py') if 't5x_model' in path.read_text()]
  assert importing == ['t5x_model.py'] and naming == []


def test_t5x_is_asked_for_at_the_commits_that_the_readme_names():
  commits = re.findall(r'git\+(\S+@[0-9a-f]{40})', ' '.join(_declared()['extras_require']['t5x']))
  readme = (ROOT / 'README.md').read_text()
  assert len(commits) == 3 and all(commit in readme for commit in commits)


def test_no_extra_of_the_tests_is_needed_to_use_the_package():
  arguments = _declared()
  required = {_normal(name) for name in arguments['install_requires']}
  wanted = {_normal(name) for name in arguments['extras_require']['dev']} - {'setuptools', 'jax'}  # jax[tpu], for libtpu
  assert not required & wanted
