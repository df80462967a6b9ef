"""`calrec plan` on a tiny model, compiled for a TPU that is not there."""

import json
import os
import subprocess
import sys

import pytest

TINY = ['--gin_file=gin/models/tiny.gin', '--gin_file=gin/runs/stage1.gin', '--gin.decoder.vocab_size=512',
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 32}", '--gin.BATCH_SIZE=8']
ENVIRONMENT = {**os.environ, 'XLA_FLAGS': ''}


def plan(*arguments):
  return subprocess.run([sys.executable, '-m', 'calrec_jax.cli', 'plan', *TINY, *arguments], capture_output=True, text=True,
                        check=False, env=ENVIRONMENT)


def told(*arguments):
  """The one line of a refusal."""
  done = plan(*arguments)
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
  (line,) = [line for line in done.stderr.splitlines() if line.startswith('calrec: error:')]
  return line


@pytest.fixture(scope='module')
def report():
  """A plan of training and inference on four chips."""
  done = plan('--topology', 'v5e:2x2', '--tries', '2', '--infer', '--targets', '100000', '--price', '1.2', '--json')
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_a_plan_has_memory_arithmetic_links_and_rates(report):
  best = report['training'][0]
  memory = best['memory']
  assert best['fits'] and memory['total'] == sum(n for name, n in memory.items() if name not in ('total', 'capacity'))
  assert memory['optimizer'] >= 2 * memory['parameters']
  assert best['flops']['products'] > best['flops']['useful'] > 0
  line = best['roofline']
  assert best['seconds'] == max(line['arithmetic'], line['memory'], sum(line['links'].values()))
  assert best['callbacks'] == []
  hours = report['epoch']['hours']
  assert hours == pytest.approx(100_000 / best['spans_per_second'] / 3600)
  assert report['epoch']['dollars'] == pytest.approx(hours * 4 * 1.2)


def test_meshes_are_tried_and_ranked(report):
  meshes = [tuple(each['mesh'].values()) for each in report['training']]
  assert len(set(meshes)) == 2 and (4, 1, 1) in meshes
  assert [each['seconds'] for each in report['training']] == sorted(each['seconds'] for each in report['training'])


def test_gradients_cross_the_data_axis(report):
  one = next(each for each in report['training'] if each['mesh']['data'] == 4)
  sums = sum(each['bytes'] * each['times'] for each in one['collectives'] if each['kind'] in ('all-reduce', 'reduce-scatter'))
  assert all(each['axes'] in ([], ['data']) for each in one['collectives'])
  assert sums >= one['memory']['parameters'] / 2  # in bfloat16 at the least


def test_prefill_and_decoding_are_planned(report):
  prefill, decode = report['inference']['prefill'], report['inference']['decode']
  assert prefill['fits'] and decode['fits']
  assert decode['memory']['prefix caches'] > 0 and decode['memory']['suffix caches'] > 0
  assert prefill['flops'] > decode['flops'] > 0


def test_slices_are_crossed_by_gradients_alone():
  done = plan('--topology', 'v5e:2x2*2', '--tries', '1', '--gin.mesh.data=2', '--gin.mesh.fsdp=4', '--json')
  assert done.returncode == 0, done.stderr
  (report,) = json.loads(done.stdout)['training']
  crossing = [each for each in report['collectives'] if 'dcn' in each['axes']]
  moved = lambda kind: sum(each['bytes'] * each['times'] for each in crossing if each['kind'] == kind)
  assert moved('all-reduce') >= report['memory']['parameters'] / 2 > 10 * moved('all-gather')  # gradients in bfloat16
  assert report['roofline']['links']['dcn'] > 0 and report['callbacks'] == []


WRONG = {
    'lies over 3 slices': ['--topology', 'v5e:2x2*3', '--gin.mesh.data=4', '--gin.mesh.fsdp=3'],
    "unknown chip 'v7'": ['--topology', 'v7:2x2'],
    'no such slice': ['--topology', 'v5e:2x3'],
    'does not divide 4 devices': ['--topology', 'v5e:2x2', '--gin.mesh.fsdp=3'],
    'BATCH_SIZE = 6 rows do not divide': ['--topology', 'v5e:2x2', '--global_batch', '6'],
    'decoder.vocab_size': ['--topology', 'v5e:2x2', '--gin.decoder.vocab_size=None'],
    '--topology is missing': []}
IN_TURN = """
import contextlib, io, json, sys
from calrec_jax import cli
for arguments in json.load(sys.stdin):
  with contextlib.redirect_stderr(io.StringIO()) as errors:
    code = cli.main(arguments)
  print(json.dumps([code, errors.getvalue()]))
"""


@pytest.fixture(scope='module')
def refusals():
  """{words: (exit code, stderr)} of `WRONG`, from one process, as starting one takes longer than all of them."""
  done = subprocess.run([sys.executable, '-c', IN_TURN], input=json.dumps([['plan', *TINY, *each] for each in WRONG.values()]),
                        capture_output=True, text=True, check=True, env=ENVIRONMENT)
  return dict(zip(WRONG, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize('words', WRONG)
def test_wrong_input_is_one_line(refusals, words):
  code, errors = refusals[words]
  (line,) = errors.splitlines()
  assert code == 2 and line.startswith('calrec: error:') and words in line


def test_a_model_that_cannot_fit_is_told_with_a_slice_on_which_it_does():
  sizes = (f'--gin.decoder.{size}' for size in ('n_layers=8', 'embed_dim=2048', 'ff_dim=16384'))
  line = told('--topology', 'v5e:2x2', '--tries', '1', *sizes)
  assert 'GB too much' in line and 'smallest slice on which it fits' in line
