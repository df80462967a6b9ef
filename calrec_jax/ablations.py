"""Ablations: trains, infers and evaluates a run and its changed copies, over several seeds, into one table (`calrec ablate`).

Each step is a command of its own, a process as a user would start it, with its log beside its results. What is there already is
not made again, so that the same command goes on after a stop.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from calrec_jax import configurables, outputs
from calrec_jax.errors import UserError
from calrec_jax.evaluation import compare

BASE = 'base'  # the name of the run that is not changed
RECORD = 'ablation.json'


def ablate(gin_files: Sequence[str], over: Sequence[str], *, task: str, out: str | os.PathLike, seeds: int = 3,
           bindings: Sequence[str] = (), method: str = 'calrec', metric: str = compare.METRIC) -> dict:
  """Runs them all; returns what `compare.compare` gives, with the unchanged run as its baseline.

  `out` gets `<name>/seed<n>/train`, `infer` and `evaluate`, where a name is that of a gin file in `over`.

  Args:
    gin_files: of the training run: a model and a stage.
    over: gin files, each a change of training, read after those.
    task: the data set that users are of.
    out: a folder, perhaps one that an earlier call has begun: with the same options, but perhaps fewer changes or seeds.
    seeds: how many; each is the seed of training and of sampling.
    bindings: `NAME=VALUE`, such as DATA_DIR, TRAIN_STEPS or sample.n_samples. A macro is given to the steps that have it; no
      `over` file may set a macro that is bound here, as a binding wins.
    method: the method whose rows are compared, such as `calrec` or `dense`.
    metric: that of the differences.

  Raises:
    UserError: a gin file that is not found or named twice, `out` begun with other options, or a step that fails, whose log is
      named.
  """
  names = [BASE, *(pathlib.Path(file).stem for file in over)]
  if twice := [name for name in names if names.count(name) > 1]:
    raise UserError(f'--over: two runs would be called {twice[0]!r}; give gin files of different names.')
  bound = {binding.partition('=')[0].strip() for binding in bindings}
  for file in over:
    if hidden := sorted(bound.intersection(_macros(_text(file)))):
      raise UserError(f'{file}: sets {hidden[0]}, and --gin.{hidden[0]} wins over it; give that in a gin file of your own, as '
                      'a --gin_file.')
  if seeds < 1:
    raise UserError(f'seeds = {seeds}: give at least 1.')
  out = pathlib.Path(out)
  _record(out, {'base': [_text(file) for file in gin_files], 'task': task, 'bindings': list(bindings)},
          {pathlib.Path(file).stem: _text(file) for file in over})
  folders = []
  for seed in range(seeds):  # a whole table of one seed first
    for name, change in zip(names, ((), *((file,) for file in over)), strict=True):
      folder = out / name / f'seed{seed}'
      for verb, done, arguments in _steps(folder, [*gin_files, *change], bindings, task, seed):
        if not done.exists():
          _call(verb, arguments, folder / f'{verb}.log')
      folders.append(f'{name}={folder / "evaluate"}:{method}')
  return compare.compare(folders, baseline=BASE, metric=metric)


def _steps(folder: pathlib.Path, gin_files: Sequence[str], bindings: Sequence[str], task: str, seed: int
           ) -> Iterator[tuple[str, pathlib.Path, list[str]]]:
  """(verb, a file that is there when it is done, its arguments) of each step."""
  train, infer, evaluate = (str(folder / name) for name in ('train', 'infer', 'evaluate'))

  def arguments(files: Sequence[str], own: Mapping[str, object], macros: set[str] | None = None) -> list[str]:
    """`macros`: only these are bound; None: all."""
    names = [binding.partition('=')[0].strip() for binding in bindings]
    kept = [binding for binding, name in zip(bindings, names, strict=True)
            if name not in own and ('.' in name or macros is None or name in macros)]
    return [*(f'--gin_file={file}' for file in files), *(f'--gin.{binding}' for binding in kept),
            *(f'--gin.{name}={value!r}' for name, value in own.items())]

  yield 'train', folder / 'trained', arguments(gin_files, {'MODEL_DIR': train, 'train.seed': seed})
  for verb, done, own in (
      ('infer', pathlib.Path(infer) / 'run.json', {'CHECKPOINT_PATH': train, 'INFER_OUTPUT_DIR': infer, 'sample.seed': seed}),
      ('evaluate', pathlib.Path(evaluate) / 'metrics.json', {'INFER_OUTPUT_DIR': infer, 'EVAL_OUTPUT_DIR': evaluate})):
    file = f'gin/runs/{verb}.gin'
    yield verb, done, arguments([file], {'MIXTURE_OR_TASK_NAME': task, **own}, set(_macros(_text(file))))


def _macros(text: str) -> list[str]:
  """The macros that a gin file sets."""
  return re.findall(r'^([A-Z][A-Z_0-9]*) *=', text, re.MULTILINE)


def _call(verb: str, arguments: Sequence[str], log: pathlib.Path) -> None:
  """Runs a verb in a process of its own. Raises UserError, with the last line of its log, if it fails."""
  log.parent.mkdir(parents=True, exist_ok=True)
  print(f'{log.parent}: {verb}', file=sys.stderr, flush=True)
  with open(log, 'a', encoding='utf-8') as file:
    code = subprocess.run([sys.executable, '-m', 'calrec_jax.cli', verb, *arguments], stdout=file, stderr=file, check=False
                          ).returncode
  if code:
    lines = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()
    raise UserError(f'{log.parent}: {verb} failed ({(lines or ["no output"])[-1][:200]}); its log is {log}.')
  if verb == 'train':
    (log.parent / 'trained').touch()


def _text(file: str) -> str:
  """A gin file's text, found as gin finds it."""
  for folder in configurables.search_paths():
    path = pathlib.Path(folder, file)
    if path.is_file():
      return path.read_text(encoding='utf-8')
  raise UserError(f'--gin_file={file}: no such file.')


def _record(out: pathlib.Path, options: dict, changes: dict[str, str]) -> None:
  """Writes the options and changes of the first call; raises UserError if the folder has others. More changes may come."""
  path, known = out / RECORD, {}
  if path.exists():
    known = json.loads(path.read_text(encoding='utf-8'))
    differs = [name for name, text in changes.items() if known['over'].get(name, text) != text]
    if differs or {name: known[name] for name in options} != options:
      raise UserError(f'{out}: was begun with {"another " + differs[0] if differs else "other gin files, bindings or task"}; '
                      'choose another --out.')
    changes = {**known['over'], **changes}
  else:
    outputs.check_unused(out)
  out.mkdir(parents=True, exist_ok=True)
  outputs.write_json(path, {**options, 'over': changes})
