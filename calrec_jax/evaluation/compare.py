"""`calrec compare`: the methods of several evaluation folders in one table, and which of their differences hold."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.evaluation import significance
from calrec_jax.evaluation.evaluate import TITLES
from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.evaluation.results import Places, Result, check_comparable, read_result

METRIC = 'ndcg@10'
METRICS = ('recall@10', 'ndcg@10', 'mrr')


@dataclasses.dataclass(frozen=True)
class Run:
  """What one argument of the command names: `[NAME=]FOLDER[:METHOD]`.

  Attributes:
    folder: an evaluation folder.
    name: of the run; several folders of one name are seeds of it.
    method: the only one of the folder's methods to compare; None for all.
  """

  folder: str
  name: str | None = None
  method: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """One method of the table.

  Attributes:
    name: what `--baseline` takes, such as `calrec`, `large:calrec`, or `large` if the command names just one method so.
    title: what the table shows.
    method: as in metrics.json.
    folders: where it was found, as the command names them.
    seeds: its places, once a seed; once if they are the same in all of `folders`.
  """

  name: str
  title: str
  method: str
  folders: list[str]
  seeds: list[Places]


def parse_run(text: str) -> Run:
  """`[NAME=]FOLDER[:METHOD]`; a text that is itself a folder is taken as it is, whatever signs are in it."""
  name = method = None
  head, sign, rest = text.partition('=')
  if not os.path.isdir(text) and sign and head and '/' not in head:
    name, text = head, rest
  head, sign, rest = text.rpartition(':')
  if not os.path.isdir(text) and sign and head and rest and '/' not in rest:
    text, method = head, rest
  return Run(str(pathlib.Path(text)), name, method)


def compare(
  runs: Sequence[str],
  *,
  metric: str = METRIC,
  metrics: Sequence[str] = METRICS,
  baseline: str | None = None,
  resamples: int = significance.RESAMPLES,
  seed: int = 0,
) -> dict:
  """Means with 95 % intervals, and paired differences of the methods of evaluation folders, as JSON.

  A method with the same places in several folders (as the baselines in each run's folder) is one row. Rows are in the order of
  `metric`, the best first.

  With a baseline the differences are each other method's to it. Without, they are those of all pairs, the ones to the best
  first: as the data pick the best, the family whose p values are corrected is all pairs. Each metric has a family of its own.

  Args:
    runs: each `[NAME=]FOLDER[:METHOD]`, see `Run`.
    metric: what decides which method is the best.
    metrics: which to compute; `metric` is added if it is not among them.
    baseline: name or title of a row.
    resamples: of the users.
    seed: of the draws of users.

  Returns:
    `protocol`, `data`, `users`, `metric`, `metrics` (names), `resamples`, `seed`, `level`; `methods`: for each row `name`,
    `title`, `method`, `folders`, `seeds` (their number), `metrics`: {metric: {`mean`, `low`, `high`, `deviation` over seeds or
    None}}; `baseline` (a name), `best` (whether it is the baseline because it is the best); `differences`: for each pair and
    metric `method`, `baseline`, `metric`, `difference`, `low`, `high`, `p`, `p_corrected` (by Holm), `holds` (whether it is
    below 0.05).

  Raises:
    UserError: a folder that `read_result` refuses, results that cannot stand in one table, an unknown metric, method or
      baseline, a name for two things, a folder that is two seeds of a name, too few resamples for so many differences.
  """
  results, rows = _read(runs)
  metrics = _checked_metrics(metric, metrics)
  values = [significance.over_seeds(np.stack([_values_UK(places, metrics) for places in row.seeds])) for row in rows]
  column = metrics.index(metric)
  order = sorted(range(len(rows)), key=lambda row: -values[row][0][:, column].mean())  # stable: equal ones as they were named
  rows, values = [rows[row] for row in order], [values[row] for row in order]
  chosen = 0 if baseline is None else _find(rows, baseline)
  pairs = [(row, chosen) for row in range(len(rows)) if row != chosen]
  if baseline is None:
    pairs += [(other, row) for row, other in itertools.combinations(range(1, len(rows)), 2)]
  _check_resamples(resamples, len(pairs), seed)

  sample = significance.bootstrap(np.stack([value_UK for value_UK, _ in values]), resamples=resamples, seed=seed)
  first = results[0]
  return {
    'protocol': first.protocol,
    'data': first.data,
    'users': len(first.user_ids),
    'metric': metric,
    'metrics': metrics,
    'resamples': resamples,
    'seed': seed,
    'level': significance.LEVEL,
    'methods': [
      {'name': row.name, 'title': row.title, 'method': row.method, 'folders': row.folders, 'seeds': len(row.seeds),
       'metrics': _estimates(sample, number, deviation_K, metrics)}
      for number, (row, (_, deviation_K)) in enumerate(zip(rows, values, strict=True))],
    'baseline': rows[chosen].name,
    'best': baseline is None,
    'differences': _differences(sample, rows, pairs, metrics),
  }


def check(runs: Sequence[str]) -> None:
  """Raises UserError if these, if there are any, could not be compared, see `compare`."""
  if runs:
    _read(runs)


def table(comparison: Mapping) -> str:
  """The result of `compare` as plain text: the methods, then the differences to the baseline in `metric`."""
  rules, metric = comparison['protocol'], comparison['metric']
  title_of = {row['name']: row['title'] for row in comparison['methods']}
  head = (f'{comparison["data"]["name"]}, {rules.get("split", "?")} split: {comparison["users"]} users '
          f'(protocol {rules["name"]}, {rules["hash"]})')
  cells = [['', *comparison['metrics']], *(
    [row['title'] + (f' ({row["seeds"]} seeds)' if row['seeds'] > 1 else ''),
     *(_cell(row['metrics'][name]) for name in comparison['metrics'])] for row in comparison['methods'])]
  notes = [f'[low, high]: {comparison["level"]:.0%} interval of the mean, {comparison["resamples"]:,} resamples of the users']
  seeds = any(row['seeds'] > 1 for row in comparison['methods'])
  if seeds:
    notes.append('±: standard deviation over seeds')
  lines = [head, *_aligned(cells), '; '.join(notes)]
  if 'caution' in rules:
    lines.append(f'caution: {rules["caution"]}')
  family = [each for each in comparison['differences'] if each['metric'] == metric]
  shown = [each for each in family if each['baseline'] == comparison['baseline']]
  if shown:
    best = 'the best, ' if comparison['best'] else ''
    cells = [['', 'difference', 'p', ''], *(
      [title_of[each['method']], f'{each["difference"]:+.4f} [{each["low"]:+.4f}, {each["high"]:+.4f}]',
       f'{each["p_corrected"]:.4f}', 'holds' if each['holds'] else 'unclear'] for each in shown)]
    lines += ['', f'{metric}, difference to {best}{title_of[comparison["baseline"]]}', *_aligned(cells),
              f'p: two-sided, over the same users{", given these seeds" if seeds else ""}, corrected by Holm for {len(family)} '
              f'{"pairs: all of them, as the data pick the best" if comparison["best"] else "pairs"}']
  return '\n'.join(lines)


def _read(texts: Sequence[str]) -> tuple[list[Result], list[Row]]:
  """Reads each folder once; (the results, which may stand in one table, and the rows in the order of the command)."""
  runs = [parse_run(text) for text in texts]
  if not runs:
    raise UserError('no evaluation folder is named; name one or more that `calrec evaluate` wrote.')
  wanted: dict[str, list[Run]] = {}
  for run in runs:
    wanted.setdefault(run.folder, []).append(run)
  results = {}
  for folder, its_runs in wanted.items():
    methods = [run.method for run in its_runs]
    results[folder] = read_result(folder, None if None in methods else list(dict.fromkeys(methods)))
  check_comparable(list(results.values()))

  seeds: dict[tuple, dict[str, Places]] = {}  # (name or place, method) -> folder -> places
  picked = set()  # those that the command names one by one
  for run in runs:
    place = str(pathlib.Path(run.folder).resolve())
    for method in [run.method] if run.method else results[run.folder].methods:
      found = seeds.setdefault((run.name or place, method), {})
      if run.name and place in {str(pathlib.Path(folder).resolve()) for folder in found}:
        raise UserError(f'{run.name}={run.folder}: the folder is there already under this name; several are several seeds.')
      found[run.folder] = results[run.folder].methods[method]
      if run.name and run.method:
        picked.add((run.name, method))
  names = {run.name for run in runs}
  return list(results.values()), _rows(seeds, picked, names)


def _rows(seeds: Mapping[tuple, Mapping[str, Places]], picked: set[tuple], names: set[str | None]) -> list[Row]:
  """One row for each key of `seeds`, but for one that is the same as another of the same method; raises UserError if two
  would have one name.
  """
  drafts: list[tuple[tuple, list[str], list[Places]]] = []
  for key, found in seeds.items():
    folders, places = list(found), list(found.values())
    places = places[:1] if all(places[0].same(other) for other in places) else places
    twin = next((draft for draft in drafts if key not in picked and draft[0] not in picked and draft[0][1] == key[1]
                 and len(places) == len(draft[2]) == 1 and places[0].same(draft[2][0])), None)
    if twin:
      twin[1].extend(folder for folder in folders if folder not in twin[1])
    else:
      drafts.append((key, folders, places))

  rows: dict[str, Row] = {}
  for key, folders, places in drafts:
    label, method = key if key[0] in names else (folders[0], key[1])
    n_rows = sum(other[1] == method and other not in picked for other, _, _ in drafts)
    shared = len(folders) > len(places)  # the same whatever the run or the seed
    if key in picked:
      name = title = label
    elif n_rows > 1 or (key[0] in names and not shared):
      name, title = f'{label}:{method}', f'{label}: {TITLES.get(method, method)}'
    else:
      name, title = method, TITLES.get(method, method)
    if name in rows:
      raise UserError(f'{name}: names two methods, {rows[name].method} of {rows[name].folders[0]} and {method} of '
                      f'{folders[0]}; give them different names.')
    rows[name] = Row(name, title, method, folders, places)
  return list(rows.values())


def _values_UK(places: Places, metrics: Sequence[str]) -> np.ndarray:
  expected = expected_metrics(places.better_U, places.tied_U)
  return np.stack([expected[metric] for metric in metrics], axis=1)


def _checked_metrics(metric: str, metrics: Sequence[str]) -> list[str]:
  """The metrics to compute, each once, `metric` among them; raises UserError for one that is not known."""
  wanted = list(dict.fromkeys([*metrics, metric]))
  known = list(expected_metrics([0], [0]))
  if unknown := [name for name in wanted if name not in known]:
    raise UserError(f'{unknown[0]!r}: no such metric; choose of {", ".join(known)}.')
  return wanted


def _check_resamples(resamples: int, n_pairs: int, seed: int) -> None:
  """Raises UserError unless the smallest p possible, 2 / (resamples + 1), is still below 0.05 when it is corrected."""
  needed = 40 * max(n_pairs, 1)
  if resamples < needed:
    raise UserError(f'resamples = {resamples}: too few to tell whether any of {n_pairs} differences holds; give at least '
                    f'{needed}.')
  if seed < 0:
    raise UserError(f'seed = {seed}: give 0 or more.')


def _find(rows: Sequence[Row], baseline: str) -> int:
  """The number of the row of this name or title; raises UserError if there is none."""
  for number, row in enumerate(rows):
    if baseline in (row.name, row.title):
      return number
  raise UserError(f'baseline {baseline!r}: no such method; choose of {", ".join(row.name for row in rows)}.')


def _estimates(
  sample: significance.Bootstrap, method: int, deviation_K: np.ndarray | None, metrics: Sequence[str]
) -> dict[str, dict]:
  low_K, high_K = sample.interval(method)
  return {
    metric: {'mean': float(sample.mean_MK[method, k]), 'low': float(low_K[k]), 'high': float(high_K[k]),
             'deviation': None if deviation_K is None else float(deviation_K[k])}
    for k, metric in enumerate(metrics)}


def _differences(
  sample: significance.Bootstrap, rows: Sequence[Row], pairs: Sequence[tuple[int, int]], metrics: Sequence[str]
) -> list[dict]:
  """All pairs in all metrics, metric by metric; the p values of one metric are corrected together."""
  found = [sample.difference(*pair) for pair in pairs]
  differences = []
  for k, metric in enumerate(metrics):
    corrected_P = significance.holm(np.array([each.p_K[k] for each in found]))
    for (row, other), each, corrected in zip(pairs, found, corrected_P.tolist(), strict=True):
      differences.append({
        'method': rows[row].name, 'baseline': rows[other].name, 'metric': metric, 'difference': float(each.mean_K[k]),
        'low': float(each.low_K[k]), 'high': float(each.high_K[k]), 'p': float(each.p_K[k]), 'p_corrected': corrected,
        'holds': corrected < significance.ALPHA})
  return differences


def _cell(estimate: Mapping) -> str:
  if estimate['deviation'] is not None:
    return f'{estimate["mean"]:.4f} ± {estimate["deviation"]:.4f}'
  return f'{estimate["mean"]:.4f} [{estimate["low"]:.4f}, {estimate["high"]:.4f}]'


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
