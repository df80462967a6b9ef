"""Inference over several processes: stopped, and gone on with by another number of them, it writes the same bytes."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
RANKERS = "('bm25', 'dense')"


def infer(store: pathlib.Path, run: pathlib.Path, out: pathlib.Path, processes: int, log: pathlib.Path) -> subprocess.Popen:
  """`launch/local_run.sh` with `calrec infer`, in its own group of processes."""
  bindings = [f"CHECKPOINT_PATH='{run}'", f"DATA_DIR='{store / 'data'}'", "MIXTURE_OR_TASK_NAME='books'",
              f"INFER_OUTPUT_DIR='{out}'", f'infer.rankers={RANKERS}', 'sample.n_samples=4', 'sample.users_per_batch=2']
  command = [ROOT / 'launch/local_run.sh', '--processes', str(processes), '--devices', '1', '--', 'infer',
             '--gin_file=gin/runs/infer.gin', *tiny.gin(bindings)]
  with open(log, 'w') as output:
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                            env=os.environ | tiny.READS_CACHE)


def end(process: subprocess.Popen, log: pathlib.Path) -> None:
  assert process.wait(timeout=200) == 0, log.read_text()[-3000:]


@pytest.mark.slow
def test_stopped_and_gone_on_with_in_another_number_the_bytes_are_those_of_one_process(tiny_store, tmp_path):
  tiny.train(tiny_store, tmp_path / 'run', inputs=tiny.inputs(tiny_store, 'books'))
  out, log = tmp_path / 'out', tmp_path / 'log'
  first = infer(tiny_store, tmp_path / 'run', out, 2, log)
  deadline = time.monotonic() + 150
  while len(list(out.glob('*.partial*'))) < 2 or min(path.stat().st_size for path in out.glob('*.partial*')) < 1500:
    assert time.monotonic() < deadline and first.poll() is None, log.read_text()[-3000:]
    time.sleep(0.02)
  os.killpg(first.pid, signal.SIGKILL)
  first.wait()
  assert len(list(out.glob('*.partial*'))) == 2 and not (out / 'generations.jsonl.gz').exists()
  end(infer(tiny_store, tmp_path / 'run', out, 1, log), log)
  end(infer(tiny_store, tmp_path / 'run', tmp_path / 'whole', 2, log), log)
  names = ['candidates-bm25.jsonl.gz', 'candidates-dense.jsonl.gz', 'generations.jsonl.gz']
  assert sorted(path.name for path in out.glob('*.gz*')) == names
  for name in names:
    assert (out / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
