"""`calrec report`: gathers what evaluations and training runs hold, and writes it as one HTML file."""

import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence

from calrec_jax import outputs, provenance
from calrec_jax.data import histories as histories_lib
from calrec_jax.errors import UserError
from calrec_jax.evaluation import significance
from calrec_jax.evaluation.compare import Run, compare, parse_run
from calrec_jax.evaluation.evaluate import TITLES
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.evaluation.generations import read_generations
from calrec_jax.evaluation.report import curves, people
from calrec_jax.evaluation.report.page import page
from calrec_jax.evaluation.results import Result, check_comparable, read_result

N_EXAMPLES = 200


def report(runs: Sequence[str], out: str | os.PathLike, *, data: str | os.PathLike | None = None, n_examples: int = N_EXAMPLES
           ) -> dict:
  """Writes the page, whole or not at all; equal inputs give equal bytes.

  Returns:
    `out`, `bytes`, `runs`, `methods`, `users`, `examples`, `notes` (what could not be shown, and why).

  Raises:
    UserError: `out` in use, or what `gather` raises.
  """
  out = pathlib.Path(out)
  if out.exists():
    raise UserError(f'{out}: the output is already in use; choose another place, or remove it first.')
  found = gather(runs, data=data, n_examples=n_examples)
  size = outputs.write_page(out, page(found))
  return {'out': str(out), 'bytes': size, 'runs': list(runs), 'methods': len(found['rows']), 'users': found['users'],
          'examples': len(found['people']), 'notes': found['notes']}


def gather(runs: Sequence[str], *, data: str | os.PathLike | None = None, n_examples: int = N_EXAMPLES) -> dict:
  """All that the page shows, as JSON values.

  Args:
    runs: each `[NAME=]FOLDER[:METHOD]` of an evaluation, or `[NAME=]FOLDER` of a training run.
    data: the histories folder that the evaluations are of; with it there are titles, histories and an audit.
    n_examples: how many users are shown.

  Raises:
    UserError: no run; a folder that is neither; a broken file; evaluations that cannot stand in one table; data that are not
      theirs; a number of examples below 0.
  """
  if not runs:
    raise UserError('no run is named; name folders of `calrec evaluate`, `calrec baselines` or `calrec train`.')
  if n_examples < 0:
    raise UserError(f'examples = {n_examples}: give 0 or more.')
  parsed = [parse_run(text) for text in runs]
  kinds = [_kind(run) for run in parsed]
  evaluations = [(text, run) for text, run, kind in zip(runs, parsed, kinds, strict=True) if kind == 'evaluation']
  results = [read_result(run.folder, [run.method] if run.method else None) for _, run in evaluations]
  check_comparable(results)
  notes: list[str] = []
  found = {'protocol': None, 'data': None, 'users': 0, 'items': 0, 'too_short_users': 0, 'rows': [], 'compared': None,
           'slices': {}, 'generations': [], 'duplicate_texts': None, 'people': [], 'audit': None, 'notes': notes}
  names = _names(parsed)
  if results:
    of_results = [name for name, kind in zip(names, kinds, strict=True) if kind == 'evaluation']
    _gather_results(found, evaluations, results, of_results)
    histories = _histories(data, results[0])
    _gather_people(found, evaluations, results, histories, n_examples)
    if histories is None:
      notes.append('Without the data set (--data) items are shown by their ids, and there are no histories and no audit.')
  found['curves'] = [each for name, run, kind in zip(names, parsed, kinds, strict=True)
                     for each in _curves(name, run, kind, notes)]
  found['origins'] = [each for name, run, kind in zip(names, parsed, kinds, strict=True) for each in _origins(name, run, kind)]
  if data is not None:
    found['audit'] = _audit(data, [run.folder for run in parsed], notes)
  return found


def _kind(run: Run) -> str:
  folder = pathlib.Path(run.folder)
  if not folder.is_dir():
    raise UserError(f'{folder}: no such folder; name one of `calrec evaluate`, `calrec baselines` or `calrec train`.')
  if (folder / 'metrics.json').exists():
    return 'evaluation'
  has_events = any(folder.glob('events.out.tfevents.*'))
  if (folder / GENERATIONS).exists() or not (has_events or (folder / 'checkpoints').is_dir()):
    raise UserError(f'{folder}: is neither an evaluation nor a training run; name a folder of `calrec evaluate`, `calrec '
                    'baselines` or `calrec train`.')
  if run.method:
    raise UserError(f'{folder}:{run.method}: a training run has no methods; leave {run.method!r} out.')
  return 'training'


def _names(parsed: Sequence[Run]) -> list[str]:
  """A name for each run, all different: what the command gives, or the folder; seeds of one name are numbered."""
  bare = [run.name or run.folder for run in parsed]
  return [name if bare.count(name) == 1 else f'{name} ({bare[:number].count(name) + 1})' for number, name in enumerate(bare)]


def _gather_results(found: dict, evaluations: Sequence[tuple[str, Run]], results: Sequence[Result], names: Sequence[str]
                    ) -> None:
  """The methods of all folders, the same one only once, and their differences; what else metrics.json has."""
  measured = [outputs.read_object(result.folder / 'metrics.json') for result in results]
  first, rows = measured[0], found['rows']
  found.update(protocol=results[0].protocol, data=results[0].data, users=len(results[0].user_ids), items=first.get('items', 0),
               too_short_users=first.get('too_short_users', 0), duplicate_texts=first.get('duplicate_texts'))
  for number, (result, told) in enumerate(zip(results, measured, strict=True)):
    for method, places in result.methods.items():
      if any(row['method'] == method and results[row['run']].methods[method].same(places) for row in rows):
        continue
      rows.append({'run': number, 'method': method, 'metrics': told['methods'][method],
                   'intervals': told.get('intervals', {}).get(method, {}), 'lists': told.get('lists', {}).get(method, {})})
    if isinstance(told.get('generations'), dict):
      found['generations'].append({'run': names[number], **told['generations']})
  several = [row['method'] for row in rows]
  for row in rows:
    title = TITLES.get(row['method'], row['method'])
    row['title'] = title if several.count(row['method']) == 1 else f'{names[row["run"]]}: {title}'
  order = list(TITLES)
  rows.sort(key=lambda row: order.index(row['method']) if row['method'] in order else len(order))
  for way, groups in first.get('slices', {}).items():
    found['slices'][way] = [
      {'group': group, 'users': each['users'],
       'methods': [measured[row['run']]['slices'].get(way, {}).get(group, {}).get('methods', {}).get(row['method'], {})
                   if 'slices' in measured[row['run']] else {} for row in rows]}
      for group, each in groups.items()]
  if len(rows) > 1:
    n_pairs = sum(len(result.methods) for result in results) ** 2 // 2
    found['compared'] = compare([text for text, _ in evaluations], resamples=max(significance.RESAMPLES, 40 * n_pairs))


def _histories(data: str | os.PathLike | None, result: Result) -> histories_lib.Histories | None:
  if data is None:
    return None
  histories = histories_lib.load(data)
  if histories.fingerprint != result.data['fingerprint']:
    raise UserError(f'{data}: is not the data set that {result.folder} is of ({result.data["name"]}, fingerprint '
                    f'{result.data["fingerprint"][:16]}); give that one as --data.')
  return histories


def _gather_people(found: dict, evaluations: Sequence[tuple[str, Run]], results: Sequence[Result],
                   histories: histories_lib.Histories | None, n_examples: int) -> None:
  user_ids = people.drawn(results[0].user_ids, n_examples)
  if not user_ids:
    return
  if histories is not None and (strange := set(user_ids) - set(histories.user_ids)):
    raise UserError(f'{results[0].folder}: has users that the data set lacks (such as {min(strange)!r}); make it anew with '
                    '`calrec evaluate`.')
  lines = [(row['title'], people.read_rows(results[row['run']].folder / f'rankings-{row["method"]}.jsonl.gz', user_ids))
           for row in found['rows']]
  texts, read = [], set()
  for (_, run), result in zip(evaluations, results, strict=True):
    named = _record(result.folder).get('generations')
    if not isinstance(named, str) or named in read:
      continue
    read.add(named)
    place = _place(result.folder, named)
    if place is None:
      found['notes'].append(f'{named}: the generated texts of {run.name or run.folder} are not there, so they are not shown.')
    else:
      texts.append((run.name or run.folder, read_generations(place)))
  found['people'] = people.people(user_ids, lines, texts, histories, found['protocol']['split'])


def _place(folder: pathlib.Path, named: str) -> pathlib.Path | None:
  """The folder or file of generations that a record names."""
  return next((place for place in provenance.places(folder, named) if place.is_file() or (place / GENERATIONS).is_file()), None)


def _record(folder: pathlib.Path) -> dict:
  """What run.json holds, {} where there is none. Raises UserError if it is broken."""
  path = folder / 'run.json'
  return outputs.read_object(path) if path.is_file() else {}


def _curves(name: str, run: Run, kind: str, notes: list[str]) -> list[dict]:
  folder = pathlib.Path(run.folder)
  if kind == 'evaluation':
    sasrec = _record(folder).get('sasrec')
    lines = curves.epoch_curves(sasrec.get('epochs')) if isinstance(sasrec, dict) else {}
    return [{'name': f'SASRec of {name}', 'by': 'epoch', 'lines': lines}] if lines else []
  try:
    lines = curves.training_curves(curves.read_events(folder))
  except ImportError:
    notes.append('tensorboard is not installed, so there are no curves of training runs; install it, and make the page anew.')
    return []
  if not lines:
    notes.append(f'{name}: its events hold no losses and no validation metrics, so it has no curves.')
  return [{'name': name, 'by': 'step', 'lines': lines}] if lines else []


def _origins(name: str, run: Run, kind: str) -> list[dict]:
  """The records of a run, and of the generations that it judged."""
  folder = pathlib.Path(run.folder)
  origins = [_origin(f'{name}: {"evaluation" if kind == "evaluation" else "training"}', folder)]
  named = _record(folder).get('generations')
  place = _place(folder, named) if isinstance(named, str) else None
  if place is not None:
    origins.append(_origin(f'{name}: generations', place if place.is_dir() else place.parent))
  return origins


def _origin(title: str, folder: pathlib.Path) -> dict:
  record, gin = _record(folder), folder / 'config.gin'
  command, versions = record.pop('command', None), record.pop('versions', {})
  if isinstance(record.get('sasrec'), Mapping):
    record['sasrec'] = {key: value for key, value in record['sasrec'].items() if key != 'epochs'}
  return {'title': title, 'folder': str(folder),
          'command': shlex.join(map(str, command)) if isinstance(command, list) else None,
          'versions': versions if isinstance(versions, dict) else {}, 'record': record,
          'gin': gin.read_text(encoding='utf-8', errors='replace') if gin.is_file() else ''}


def _audit(data: str | os.PathLike, folders: Sequence[str], notes: list[str]) -> dict | None:
  """What the audit says; None, and a note, if it cannot be made: a page of numbers is worth having without it."""
  try:
    from calrec_jax.evaluation.audit.audit import audit
    return audit(data, list(dict.fromkeys(folders)))
  except Exception as error:
    notes.append(f'The audit could not be made ({type(error).__name__}: {" ".join(str(error).split())[:300]}).')
    return None
