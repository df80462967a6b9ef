"""Kills a training process at random moments, starts it again until it ends, and compares it with one that was never killed.

`test_kills.py` does it twice; ten times, three of them while a checkpoint is being written:

  PYTHONPATH=. python tests/training/kills.py --kills 10 --inside 3
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

from calrec_jax.training import checkpoints

TESTS = pathlib.Path(__file__).resolve().parents[1]
STEPS = 60

CHILD = '''
import dataclasses, os, pathlib, sys
sys.path[:0] = [{tests!r}, {root!r}]
import conftest, tiny
from calrec_jax.training import trainer
from calrec_jax.training.optimizer import Optimizer
prefetched = trainer._prefetched
def told(*args):
  for step, batch in prefetched(*args):
    os.write(1, f'step {{step}}\\n'.encode())  # at once: a kill leaves no half line
    yield step, batch
trainer._prefetched = told
tiny.train(pathlib.Path({store!r}), pathlib.Path({model_dir!r}), train_steps={steps},
           decoder=dataclasses.replace(tiny.DECODER, dropout=0.2), optimizer=Optimizer(warmup_steps=2, average_decay=0.9),
           schedule=trainer.Schedule(log_every=1, eval_every=20, save_every=3, keep=2))
'''


@dataclasses.dataclass
class Killed:
  """One life of the process: the steps it began, whether it was killed, and what lay half-written beside its checkpoints."""

  steps: list[int]
  killed: bool
  half_written: list[str]


def start(store: pathlib.Path, model_dir: pathlib.Path, steps: int, killed: bool) -> subprocess.Popen:
  import tiny
  code = CHILD.format(tests=str(TESTS), root=str(TESTS.parent), store=str(store), model_dir=str(model_dir), steps=steps)
  with open(f'{model_dir}.stdout', 'w') as stdout, open(f'{model_dir}.stderr', 'a') as stderr:
    return subprocess.Popen([sys.executable, '-c', code], stdout=stdout, stderr=stderr,
                            env=os.environ | (tiny.READS_CACHE if killed else {}))


def half_written(model_dir: pathlib.Path) -> list[str]:
  """Folders of steps that have not got their name yet."""
  folder = model_dir / 'checkpoints'
  return sorted(path.name for path in folder.iterdir() if not path.name.isdigit()) if folder.is_dir() else []


def live(store: pathlib.Path, model_dir: pathlib.Path, steps: int, *, after: float | None = None,
         inside: bool = False) -> Killed:
  """Runs the process; kills it `inside` the writing of a checkpoint, or so many seconds `after` there was a whole one."""
  process = start(store, model_dir, steps, killed=inside or after is not None)
  told, first, killed = pathlib.Path(f'{model_dir}.stdout'), None, False
  while process.poll() is None:
    trains = bool(told.stat().st_size)
    if first is None and trains and checkpoints.newest_step(model_dir) is not None:
      first = time.monotonic()
    due = first is not None and after is not None and time.monotonic() - first >= after
    if trains and not killed and (half_written(model_dir) if inside else due):
      process.send_signal(signal.SIGKILL)
      killed = True
    time.sleep(0.0005)
  begun = [int(step) for step in re.findall(r'^step (\d+)\n', told.read_text(), re.MULTILINE)]
  if not killed and process.returncode:
    raise AssertionError(f'the process failed by itself, code {process.returncode}: see {model_dir}.stderr')
  return Killed(begun, process.returncode == -signal.SIGKILL, half_written(model_dir))


def run(store: pathlib.Path, model_dir: pathlib.Path, *, kills: int, inside: int, seed: int, seconds: float,
        steps: int = STEPS) -> list[Killed]:
  """Kills the run so many times, `inside` of them while a checkpoint is written, and lets it end. All its lives.

  `seconds` of training: the others are killed at a moment drawn from as many. A life that ended before it was killed, or
  was killed outside of a checkpoint's writing where inside was meant, does not count, and its folder is begun anew.
  """
  draw, lives = random.Random(seed), []
  plan = [True] * inside + [False] * (kills - inside)
  draw.shuffle(plan)
  for is_inside in plan:
    for _ in range(20):
      found = live(store, model_dir, steps, after=draw.uniform(0, seconds), inside=is_inside)
      if not found.killed:
        raise AssertionError('the run ended before it was killed often enough: give it more steps')
      if not is_inside or found.half_written:
        break
    else:
      raise AssertionError('no kill fell into the writing of a checkpoint')
    lives.append(found)
  lives.append(live(store, model_dir, steps))
  return lives


def compare(model_dir: pathlib.Path, whole: pathlib.Path) -> list[object]:
  """What is not the same bit for bit in two finished runs: arrays of the last checkpoint, logged values."""
  from test_resume import Run, differing
  return differing(Run(None, model_dir), Run(None, whole))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--inside', type=int, default=3, help='of them while a checkpoint is written')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--steps', type=int, default=240)
  options = parser.parse_args()
  sys.path[:0] = [str(TESTS), str(TESTS / 'training'), str(TESTS.parent)]
  import conftest  # noqa: F401  (the environment of the child)
  import tiny
  folder = pathlib.Path(tempfile.mkdtemp(prefix='kills'))
  store = tiny.write_store(folder / 'store')
  live(store, folder / 'whole', options.steps)
  seconds = 1.5 * options.steps / 60  # of training in one life, on average a part of the whole
  lives = run(store, folder / 'killed', kills=options.kills, inside=options.inside, seed=options.seed, seconds=seconds,
              steps=options.steps)
  for number, one in enumerate(lives):
    print(f'life {number}: steps {one.steps[0]} to {one.steps[-1]}, '
          f'{"killed" if one.killed else "ended"}, half-written: {", ".join(one.half_written) or "nothing"}')
  differ = compare(folder / 'killed', folder / 'whole')
  print(json.dumps({'name': 'kill_and_resume', 'kills': sum(one.killed for one in lives),
                    'inside_a_checkpoint': sum(bool(one.half_written) for one in lives), 'differing': len(differ)}))
  sys.exit(bool(differ))


if __name__ == '__main__':
  main()
