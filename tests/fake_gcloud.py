"""A cloud of one TPU VM on this machine: a `gcloud` on PATH that records its calls and fails on cue, and what it runs."""

import json
import os
import pathlib
import subprocess
import sys

TPU_RUN = pathlib.Path(__file__).resolve().parents[1] / 'launch/tpu_run.sh'
BASE = ['--name', 'vm', '--zone', 'z', '--poll', '0']

# The VM is a folder: `state` and `home`. `ssh` runs the script here; what needs a network is faked. Each line of a cue is used
# once: `refusals` are what `create` answers (an empty line: nothing), `requests` the states through which each queued resource
# goes, one a look, `reasons` why one failed, `drops` the connections that break while the log is followed, `lost_starts` those
# that break when the command has just been started, `no_outcomes` when it is asked for, `workers` what all workers answer.
FAKE_GCLOUD = '''#!PYTHON -IS
import json, os, pathlib, re, shutil, sys
cloud = pathlib.Path(os.environ['FAKE_CLOUD'])
args = sys.argv[1:]
with open(cloud / 'calls.jsonl', 'a') as calls: calls.write(json.dumps(args) + chr(10))
state, home, queued = cloud / 'state', cloud / 'home', cloud / 'queued'

def take(cue):
  path = cloud / cue
  lines = path.read_text().splitlines() if path.exists() else []
  if lines: path.write_text(chr(10).join(lines[1:]))
  return lines[0] if lines else ''

def refuse(message): sys.exit('ERROR: (gcloud.compute.tpus) ' + message)

def make_vm():
  home.mkdir(exist_ok=True)
  state.write_text('READY')

def delete_vm():
  shutil.rmtree(home, ignore_errors=True)
  state.unlink(missing_ok=True)

if args[:2] == ['storage', 'rsync']:
  source, target = cloud / 'bucket' / args[-2].removeprefix('gs://b/'), pathlib.Path(args[-1])
  assert target.is_dir(), 'gcloud storage rsync takes folders that exist'
  if not source.is_dir(): refuse('no such folder')
  for path in source.rglob('*'):
    name = path.relative_to(source)
    if path.is_file() and not re.match(args[args.index('--exclude') + 1], str(name)):
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(path, target / name)
  sys.exit(0)
kind, verb = args[2], args[3]
if (cloud / 'signed_out').exists(): refuse('You do not currently have an active account selected.')
now = state.read_text().strip() if state.exists() else 'ABSENT'
if kind == 'queued-resources':
  states = queued.read_text().split() if queued.exists() else []
  if verb == 'create':
    assert not states and now == 'ABSENT', (states, now)
    if message := take('refusals'): refuse(message)
    queued.write_text(take('requests') or 'ACTIVE')
  elif not states: refuse('NOT_FOUND: Resource was not found')
  elif 'failedData' in args[-1]: print(take('reasons'))
  elif verb == 'describe':
    print(states[0])
    if states[0] == 'ACTIVE' and now == 'ABSENT': make_vm()
    queued.write_text(' '.join(states[1:] or states))
  elif verb == 'delete':
    if states[0] == 'ACTIVE' and '--force' not in args: refuse('DeleteQueuedResource is not supported when state is ACTIVE')
    queued.unlink()
    delete_vm()
elif verb == 'describe':
  if now == 'ABSENT': refuse('NOT_FOUND: Resource was not found')
  print(now)
elif verb == 'create':
  if message := take('refusals'): refuse(message)
  assert now == 'ABSENT' and not queued.exists(), now
  make_vm()
elif verb == 'delete': delete_vm()
elif verb == 'start': state.write_text('READY')
elif now != 'READY' or (cloud / 'silent').exists(): sys.exit(255)
elif verb == 'scp':
  if args[4].startswith('vm:'): shutil.copy(home / args[4].removeprefix('vm:'), args[5])
  elif args[4].endswith('.tgz'): shutil.copy(args[4], home)
elif verb == 'ssh':
  script = args[args.index('--command') + 1]
  if 'apt-get' in script:
    if (cloud / 'broken_install').exists() and 'install.sh' in script: sys.exit(1)
    for folder in ('calrec_source', 'calrec_venv/bin'): (home / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(cloud / 'program', home / 'calrec_venv/bin/calrec')
    sys.exit(0)
  if 'hostname' in script and (answer := take('workers')):
    print(answer.replace(';', chr(10)))
    sys.exit(0)
  if 'cat exit' in script and take('no_outcomes'): sys.exit(255)
  if 'tail -n' in script and take('drops'):
    first = int(re.search(r'tail -n [+](.*?) ', script)[1])
    sys.stdout.writelines((home / 'calrec_run/log').read_text().splitlines(keepends=True)[first - 1:])
    sys.exit(255)
  command = ['bash', '-c', script.replace('sleep 1', 'sleep 0.2')]
  env = dict(os.environ, HOME=str(home))
  if 'nohup' in script and take('lost_starts'): sys.exit(os.spawnvpe(os.P_WAIT, 'bash', command, env) or 255)
  os.execvpe('bash', command, env)
'''

# Stands for `calrec` on the worker: notes its arguments, then acts out the next line of the play.
FAKE_PROGRAM = '''#!PYTHON -IS
import json, os, pathlib, sys, time
cloud = pathlib.Path(os.environ['FAKE_CLOUD'])
with open(cloud / 'runs.jsonl', 'a') as runs: runs.write(json.dumps(sys.argv[1:]) + chr(10))
n_runs = len((cloud / 'runs.jsonl').read_text().splitlines())
act = json.loads((cloud / 'play.json').read_text())[n_runs - 1]
for name in act.get('writes', []):
  path = pathlib.Path(name)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(name)
print('line of run', n_runs, flush=True)
cue = cloud / act.get('while', 'none')
while cue.exists() and cue.read_text(): time.sleep(0.05)
if 'while' in act: print('end of run', n_runs, flush=True)
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
      path.write_text(text.replace('PYTHON', sys.executable))
      path.chmod(0o755)
    self.play({'code': 0})
    self.env = dict(os.environ, FAKE_CLOUD=str(folder), PATH=f'{folder / "bin"}:{os.environ["PATH"]}')

  def play(self, *acts: dict) -> None:
    """What the command does in each of its runs: `code`, `state` of the VM after it, `writes`, and the cue it waits for."""
    (self.folder / 'play.json').write_text(json.dumps(acts))

  def cue(self, name: str, *lines: str) -> None:
    (self.folder / name).write_text('\n'.join(lines) if lines else 'on')

  def start(self, *options: str, command: tuple | list = ('train',), before: tuple | list = ()) -> subprocess.Popen:
    words = [*before, TPU_RUN, *BASE, *options, *(['--', *command] if command else [])]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=self.env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

  def run(self, *options: str, command: tuple | list = ('train',)) -> subprocess.CompletedProcess:
    process = self.start(*options, command=command)
    try:
      output, errors = process.communicate(timeout=120)
    finally:
      process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

  def lines(self, name: str) -> list:
    path = self.folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self, verb: str) -> list[list[str]]:
    return [call for call in self.lines('calls.jsonl') if call[3] == verb]

  @property
  def verbs(self) -> list[str]:
    return [call[3] for call in self.lines('calls.jsonl') if call[3] != 'describe']

  @property
  def runs(self) -> list[list[str]]:
    return self.lines('runs.jsonl')

  @property
  def vm_exists(self) -> bool:
    return (self.folder / 'state').exists()
