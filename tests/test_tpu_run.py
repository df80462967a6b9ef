"""The TPU run against a fake gcloud whose worker is this machine: every way in, every trouble, every way out; dry runs."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from fake_gcloud import BASE, TPU_RUN, Cloud

# What a shell could spoil: quotes of both kinds, blanks, a dollar, a star, a line break, an empty word.
HARD_WORDS = ['train', "--gin.MODEL_DIR='/mnt/a b'", '--gin.X="$HOME"', '*', "it's", 'a\nb', '', '\\', '-x;&|']


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


def test_an_absent_vm_is_made_and_the_command_runs_to_its_end(cloud):
  done = cloud.run('--spot', '--project', 'p', command=HARD_WORDS)
  assert done.returncode == 0, done.stderr
  assert cloud.verbs[0] == 'create' and cloud.verbs.count('create') == 1
  [create] = cloud.calls('create')
  assert create[4:] == ['vm', '--zone', 'z', '--project', 'p', '--accelerator-type', 'v5litepod-8',
                        '--version', 'v2-alpha-tpuv5-lite', '--spot']
  assert cloud.runs == [HARD_WORDS]  # every word reached the program as it was given
  assert 'line of run 1' in done.stdout  # the log was followed


def test_start_and_installation_go_to_all_workers_and_the_log_comes_from_one(cloud):
  assert cloud.run().returncode == 0
  workers = [call[call.index('--worker') + 1] for call in cloud.calls('ssh')]
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
  cloud.cue('workers', 'w0 75;w1 7')  # the fake workers share one home
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
  cloud.cue('hold')
  cloud.play({'code': 0, 'while': 'hold'})
  first, second = cloud.start(), None
  try:
    assert first.stdout.readline() == 'line of run 1\n'
    cloud.cue('no_outcomes', 'a connection that breaks when the second asks')
    second = cloud.start()
    assert second.stdout.readline() == 'line of run 1\n'
    cloud.cue('hold', '')
    for process in (first, second):
      assert 'end of run 1' in process.communicate(timeout=60)[0] and process.returncode == 0
  finally:
    (cloud.folder / 'hold').unlink()
    [process.kill() for process in (first, second) if process]
  assert len(cloud.runs) == 1 and cloud.verbs.count('scp') == 1


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


def last_line(text: str) -> str:
  return text.strip().splitlines()[-1]


def removal(errors: str) -> list[str]:
  """The command that the last line names; every way out that leaves something has it."""
  return shlex.split(last_line(errors).split('this deletes it: ')[1])


@pytest.mark.parametrize('queued', [[], ['--queued']])
@pytest.mark.parametrize('refusal, said', [
    ("Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone z.",
     "the project's quota does not allow v5litepod-8 in z as a spot VM; ask for more"),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", 'gcloud refuses to make this VM and would do so again'),
    ('Cloud TPU API has not been used in project 1 before or it is disabled.', 'would do so again'),
    ('INVALID_ARGUMENT: accelerator type v5litepod-9 was not found', 'would do so again'),
])
def test_lack_of_quota_or_of_a_permission_ends_the_run_at_once(cloud, refusal, said, queued):
  cloud.cue('refusals', refusal)
  done = cloud.run('--spot', *queued)
  assert (done.returncode, cloud.verbs) == (1, ['create']), done.stderr
  assert refusal in done.stderr and said in done.stderr
  assert last_line(done.stderr) == '# no TPU VM vm is left'


def test_lack_of_capacity_is_retried(cloud):
  cloud.cue('refusals', 'There is no more capacity in the zone "z"; you can try in another zone', 'RESOURCE_EXHAUSTED',
            "Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'", 'Internal error')
  done = cloud.run()
  assert (done.returncode, cloud.verbs.count('create'), len(cloud.runs)) == (0, 5, 1), done.stderr


def test_lack_of_capacity_is_retried_within_the_bound(cloud):
  cloud.cue('refusals', *['no more capacity in the zone'] * 9)
  done = cloud.run('--retries', '2')
  assert (done.returncode, cloud.verbs) == (3, ['create'] * 3)
  assert last_line(done.stderr) == '# no TPU VM vm is left'


def test_a_queued_resource_is_waited_for(cloud):
  cloud.cue('requests', 'ACCEPTED WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  done = cloud.run('--queued', '--spot', '--type', 'v5litepod-64', '--project', 'p', '--delete')
  assert (done.returncode, len(cloud.runs)) == (0, 1), done.stderr
  [create], [delete] = cloud.calls('create'), cloud.calls('delete')
  assert create[2:] == ['queued-resources', 'create', 'vm', '--zone', 'z', '--project', 'p', '--node-id', 'vm',
                        '--accelerator-type', 'v5litepod-64', '--runtime-version', 'v2-alpha-tpuv5-lite', '--spot']
  assert delete[2:] == ['queued-resources', 'delete', 'vm', '--zone', 'z', '--project', 'p', '--force', '--quiet']
  states = re.findall(r'^# vm: (\S+)$', done.stderr, re.MULTILINE)  # a new state is told once
  assert states == ['ABSENT', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE', 'READY']
  assert not cloud.vm_exists and last_line(done.stderr) == '# no TPU VM vm is left'


@pytest.mark.parametrize('end', ['FAILED', 'SUSPENDED'])
def test_a_queued_resource_that_comes_to_nothing_is_made_anew(cloud, end):
  cloud.cue('requests', f'WAITING_FOR_RESOURCES {end}', f'PROVISIONING {end}', 'WAITING_FOR_RESOURCES ACTIVE')
  cloud.cue('reasons', 'no capacity until the end of its time', 'the same')
  done = cloud.run('--queued')
  assert (done.returncode, len(cloud.runs)) == (0, 1), done.stderr
  assert [verb for verb in cloud.verbs if verb in ('create', 'delete')] == ['create', 'delete'] * 2 + ['create']
  assert ('no capacity until' in done.stderr) == (end == 'FAILED')


def test_queued_resources_that_come_to_nothing_are_bounded(cloud):
  cloud.cue('requests', *['PROVISIONING SUSPENDED'] * 9)
  done = cloud.run('--queued', '--retries', '2')
  assert (done.returncode, cloud.verbs) == (3, ['create', 'delete'] * 3), done.stderr


def test_a_queued_resource_that_failed_for_quota_ends_the_run_and_is_deleted(cloud):
  cloud.cue('requests', 'FAILED')
  cloud.cue('reasons', "Quota 'TPUV5sLitepodPerProjectPerRegionForTPUAPI' exhausted. Limit 0 in region r")
  done = cloud.run('--queued')
  assert (done.returncode, cloud.verbs) == (1, ['create', 'delete']), done.stderr
  assert "the project's quota does not allow" in done.stderr and last_line(done.stderr) == '# no TPU VM vm is left'


def test_a_queued_vm_that_was_preempted_is_made_anew_with_its_request(cloud):
  cloud.play({'code': 143, 'state': 'PREEMPTED'}, {'code': 0})
  done = cloud.run('--queued', '--spot')
  assert (done.returncode, len(cloud.runs)) == (0, 2), done.stderr
  made = [call[2:4] for call in cloud.lines('calls.jsonl') if call[3] in ('create', 'delete')]
  assert made == [['queued-resources', verb] for verb in ('create', 'delete', 'create')]
  assert removal(done.stderr)[3:5] == ['queued-resources', 'delete']


def test_a_lost_connection_is_made_again_and_the_command_left_alone(cloud):
  cloud.cue('drops', 'one', 'two', 'three')
  cloud.play({'code': 0, 'while': 'drops'})
  done = cloud.run('--retries', '0')  # it is no restart
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'line of run 1\nend of run 1\n'  # each line once
  assert done.stderr.count('connection to worker 0 was lost') == 3
  assert len(cloud.runs) == 1 and cloud.verbs.count('scp') == 1


def test_a_connection_lost_at_the_start_starts_nothing_twice(cloud):
  cloud.cue('lost_starts', 'one')
  cloud.cue('drops', 'one')
  cloud.play({'code': 0, 'while': 'drops'})
  done = cloud.run()
  assert (done.returncode, done.stdout) == (0, 'line of run 1\nend of run 1\n'), done.stderr
  assert len(cloud.runs) == 1 and cloud.verbs.count('scp') == 1


def test_a_worker_that_no_longer_answers_is_given_up_and_not_deleted(cloud):
  cloud.cue('hold')
  cloud.play({'code': 0, 'while': 'hold'})
  process = cloud.start('--retries', '2', '--delete')
  try:
    assert process.stdout.readline() == 'line of run 1\n'
    cloud.cue('silent')
    cloud.cue('hold', '')
    errors = process.communicate(timeout=60)[1]
  finally:
    (cloud.folder / 'hold').unlink()
    process.kill()
  assert process.returncode == 3 and 'the command may still run' in errors
  assert 'the TPU VM vm still exists (READY) and costs money' in last_line(errors) and cloud.vm_exists


@pytest.mark.parametrize('case', ['well', 'failed', 'given up', 'not set up', 'queued'])
def test_a_vm_that_is_left_is_named_in_the_last_line(cloud, case):
  cloud.play(*[{'code': {'failed': 7, 'given up': 75}.get(case, 0)}] * 2)
  if case == 'not set up':
    cloud.cue('broken_install')
  done = cloud.run('--retries', '2' if case == 'not set up' else '1', *['--queued'] * (case == 'queued'))
  assert done.returncode == {'failed': 7, 'given up': 3, 'not set up': 1}.get(case, 0), done.stderr
  assert 'the TPU VM vm still exists (READY) and costs money; this deletes it: gcloud' in last_line(done.stderr)
  assert 'delete' not in cloud.verbs and cloud.vm_exists
  assert subprocess.run(removal(done.stderr), env=cloud.env).returncode == 0 and not cloud.vm_exists


@pytest.mark.parametrize('code', [0, 7])
def test_with_delete_nothing_is_asked_and_nothing_left(cloud, code):
  cloud.play({'code': code})
  done = cloud.run('--delete')
  assert (done.returncode, cloud.vm_exists) == (code, False)
  assert last_line(done.stderr) == '# no TPU VM vm is left'


# Runs a command on a terminal of its own: what is typed comes from stdin, what is shown goes to stdout.
TERMINAL = [sys.executable, '-c', 'import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))']


@pytest.mark.parametrize('typed, deleted', [('y\n', True), ('n\n', False), ('\n', False), ('\x03', False)])
@pytest.mark.parametrize('code', [0, 7])
def test_on_a_terminal_the_end_asks_before_it_deletes(cloud, typed, deleted, code):
  cloud.play({'code': code})
  process = cloud.start(before=TERMINAL)
  watchdog = threading.Timer(120, process.kill)  # else a question that is not answered would last for ever
  watchdog.start()
  try:
    shown = ''
    while '[y/N] ' not in shown:
      shown += process.stdout.read(1) or pytest.fail(shown)
    assert 'Delete the TPU VM vm (READY)? It costs money' in shown and cloud.vm_exists
    process.stdin.write(typed)
    process.stdin.flush()
    shown += process.stdout.read()
    assert process.wait(timeout=60) == code, shown
  finally:
    watchdog.cancel()
    process.kill()
  assert cloud.vm_exists != deleted
  assert ('no TPU VM vm is left' if deleted else 'the TPU VM vm still exists (READY) and costs money') in last_line(shown)


@pytest.mark.parametrize('name, code', [('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 129)])
def test_a_signal_leaves_the_command_alone_and_names_the_vm(cloud, name, code):
  cloud.cue('hold')
  cloud.play({'code': 0, 'while': 'hold'})
  process = cloud.start('--delete')
  try:
    assert process.stdout.readline() == 'line of run 1\n'
    process.send_signal(getattr(signal, name))
    errors = process.communicate(timeout=60)[1]  # ends only if what it had begun has ended too
    assert process.returncode == code, errors
    assert 'what runs on the VM goes on, and the same call follows it again' in errors
    assert 'the TPU VM vm still exists (READY) and costs money' in last_line(errors) and cloud.vm_exists
    again = cloud.start()
    assert again.stdout.readline() == 'line of run 1\n'
    cloud.cue('hold', '')
    assert again.communicate(timeout=60)[0] == 'end of run 1\n' and len(cloud.runs) == 1
  finally:
    (cloud.folder / 'hold').unlink()
    process.kill()


def test_a_signal_in_the_queue_names_the_request(cloud):
  cloud.cue('requests', 'WAITING_FOR_RESOURCES')
  process = cloud.start('--queued')
  try:
    while 'WAITING_FOR_RESOURCES' not in process.stderr.readline():
      assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
  finally:
    process.kill()
  assert process.returncode == 143 and 'vm still exists (WAITING_FOR_RESOURCES) and will cost money' in last_line(errors)
  assert removal(errors) == 'gcloud compute tpus queued-resources delete vm --zone z --force'.split()


def test_a_gcloud_that_does_not_answer_is_no_sign_that_nothing_is_left(cloud):
  cloud.cue('signed_out')
  done = cloud.run('--queued')
  assert done.returncode == 1 and 'vm may still exist (gcloud does not answer) and costs money' in last_line(done.stderr)
  assert removal(done.stderr)[3] == 'queued-resources'


def test_results_come_here_without_their_checkpoints(cloud, tmp_path):
  cloud.play({'code': 0, 'writes': ['runs/a b/metrics.json', 'runs/a b/checkpoints/0/weights', 'runs/a b/events/one']})
  for name in ('metrics.json', 'checkpoints/0/weights', 'events/one'):
    (cloud.folder / 'bucket/run' / name).parent.mkdir(parents=True, exist_ok=True)
    (cloud.folder / 'bucket/run' / name).touch()
  vm, bucket = tmp_path / 'from vm', tmp_path / 'made/from bucket'
  done = cloud.run('--fetch', 'runs/a b', str(vm), '--fetch', 'gs://b/run', str(bucket), '--delete')
  assert (done.returncode, cloud.vm_exists) == (0, False), done.stderr
  for folder in (vm, bucket):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
    assert files == {'metrics.json', 'events/one'}


def test_nothing_is_deleted_before_the_results_are_here(cloud, tmp_path):
  done = cloud.run('--fetch', 'runs/x', str(tmp_path / 'x'), '--delete')
  assert (done.returncode, cloud.vm_exists, len(cloud.runs)) == (1, True, 1)
  assert 'runs/x could not be fetched; the same call without the command tries again' in done.stderr
  assert 'the TPU VM vm still exists (READY) and costs money' in last_line(done.stderr)
  (cloud.folder / 'home/calrec_source/runs/x').mkdir(parents=True)
  (cloud.folder / 'home/calrec_source/runs/x/metrics.json').touch()
  done = cloud.run('--fetch', 'runs/x', str(tmp_path / 'x'), '--delete', command=())
  assert (done.returncode, cloud.vm_exists, len(cloud.runs)) == (0, False, 1), done.stderr
  assert (tmp_path / 'x/metrics.json').exists()


def test_a_failed_command_fetches_nothing(cloud, tmp_path):
  cloud.play({'code': 7})
  assert cloud.run('--fetch', 'runs/x', str(tmp_path / 'x')).returncode == 7
  assert not (tmp_path / 'x').exists()


def test_data_and_runs_in_the_checkout_stay_here(cloud, tmp_path, monkeypatch):
  for name in ('launch/tpu_run.sh', 'data/huge', 'runs/huge', '.git/huge', '.venv/huge', 'calrec_jax/data/amazon.py'):
    (tmp_path / 'checkout' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'checkout' / name).touch()
  monkeypatch.setattr('fake_gcloud.TPU_RUN', shutil.copy(TPU_RUN, tmp_path / 'checkout/launch'))
  assert cloud.run().returncode == 0
  names = subprocess.run(['tar', '-tzf', cloud.folder / 'home/calrec_source.tgz'], capture_output=True, text=True).stdout
  files = {name for name in names.splitlines() if not name.endswith('/')}
  assert files == {'./calrec_jax/data/amazon.py', './launch/tpu_run.sh'}


def _shell_words(script: str) -> list[list[str]]:
  """The words of each command of a script, as bash itself reads them."""
  marker = 'for word in "$@"; do printf "%s\\0" "$word"; done; printf "\\1"'
  functions = f'gcloud() {{ set -- gcloud "$@"; {marker}; }}; tar() {{ set -- tar "$@"; {marker}; }}\n'
  output = subprocess.run(['bash', '-c', functions + script], capture_output=True, text=True, check=True).stdout
  return [command.split('\0')[:-1] for command in output.split('\1')[:-1]]


def test_a_dry_run_prints_every_command_and_runs_none(cloud, tmp_path):
  data = tmp_path / 'my data'
  data.mkdir()
  done = cloud.run('--dry_run', '--spot', '--data', str(data), command=HARD_WORDS)
  assert done.returncode == 0, done.stderr
  assert cloud.lines('calls.jsonl') == []
  commands = _shell_words(done.stdout)
  shown = [' '.join(words[:5]).removeprefix('gcloud compute tpus tpu-vm ') for words in commands]
  assert [line.split()[0] for line in shown] == [
      'describe', 'create', 'tar', 'scp', 'ssh', 'scp', 'ssh', 'ssh', 'ssh', 'delete']
  scripts = [words[words.index('--command') + 1] for words in commands if '--command' in words]
  for script, expected in zip(scripts, ['install.sh ~/calrec_venv tpu', 'calrec train', 'tail', 'cat exit'], strict=True):
    assert expected in script
    subprocess.run(['bash', '-n', '-c', script], check=True)
  start = next(line for line in scripts[1].splitlines() if line.startswith('nohup'))
  words = shlex.split(scripts[1][scripts[1].index(start):].replace('\\\n', ' '))
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
    ([*BASE, '--data', '/no/such/folder', '--', 'train'], 'is not a folder'),
    ([*BASE, '--fetch', 'runs', '--', 'train'], '--fetch needs FOLDER and LOCAL'),
    ([*BASE, '--fetch', 'runs', '/dev/null', '--', 'train'], "'/dev/null' is not a folder"),
    ([*BASE, '--delete', '--'], 'no command'),
])
def test_wrong_usage_is_one_line_and_code_2(cloud, words, said):
  done = subprocess.run([TPU_RUN, *words], env=cloud.env, capture_output=True, text=True)
  assert done.returncode == 2 and done.stdout == ''
  assert said in done.stderr and done.stderr.count('\n') == 1
  assert cloud.lines('calls.jsonl') == []


