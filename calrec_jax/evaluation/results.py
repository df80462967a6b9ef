"""Evaluation folders, read back and checked: which results may stand in one table (design: Truth)."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError
from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.evaluation.protocols import protocol_hash

AGAIN = 'make the folder anew with `calrec evaluate`'
TOLERANCE = 1e-9  # of a mean: sums in another order differ by far less, another ranking by far more
_MOST_ITEMS = 2**31 - 1  # where metrics.json has no number of items


@dataclasses.dataclass(frozen=True)
class Places:
  """Where one method ranks each user's target, in the order of the file.

  Attributes:
    better_U: int64, how many items score strictly above the target.
    tied_U: int64, how many other items score exactly as the target.
  """

  better_U: np.ndarray
  tied_U: np.ndarray

  def same(self, other: 'Places') -> bool:
    """Whether both rank every target alike, so that no metric tells them apart."""
    return np.array_equal(self.better_U, other.better_U) and np.array_equal(self.tied_U, other.tied_U)


@dataclasses.dataclass(frozen=True)
class Result:
  """An evaluation folder.

  Attributes:
    folder: where it lies, as it was named.
    protocol: the rules, with `name` and `hash`; the hash fits the rules.
    data: `name` and `fingerprint` of the data set.
    user_ids: the U users, in the order of the files: the same for all methods.
    methods: each method's places.
  """

  folder: pathlib.Path
  protocol: dict
  data: dict
  user_ids: list[str]
  methods: dict[str, Places]


def read_result(folder: str | os.PathLike, methods: Sequence[str] | None = None) -> Result:
  """Reads what `calrec evaluate` wrote: metrics.json, and the rankings of `methods` (None: of all).

  Raises:
    UserError: no such folder; no metrics.json in it, or one that is not JSON; no protocol or hash, or a hash that does not
      fit its rules; no data set; a method that is not there; a rankings file that is missing, truncated, broken, of other
      users than the first file, or that does not give the means in metrics.json.
  """
  folder = pathlib.Path(folder)
  found = _metrics_of(folder)
  _check_protocol(folder, found)
  data, known, n_users = found.get('data'), found.get('methods'), found.get('users')
  if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ('name', 'fingerprint')):
    raise UserError(f'{folder}/metrics.json: expected "data" with a name and a fingerprint; {AGAIN}.')
  if not isinstance(known, dict) or not known or not all(isinstance(means, dict) for means in known.values()):
    raise UserError(f'{folder}/metrics.json: expected "methods" with the metrics of each; {AGAIN}.')
  if unknown := [method for method in methods or () if method not in known]:
    raise UserError(f'{folder}: has no method {unknown[0]!r}; it has {", ".join(known)}.')
  n_items = found.get('items')
  user_ids, places = None, {}
  for method in methods or known:
    path = folder / f'rankings-{method}.jsonl.gz'
    if not path.is_file():
      raise UserError(f'{path}: no such file, although metrics.json has the method; copy it there, or {AGAIN}.')
    its_user_ids, places[method] = _read_places(path, n_items if type(n_items) is int else _MOST_ITEMS)
    user_ids = its_user_ids if user_ids is None else user_ids
    if len(its_user_ids) != n_users:
      raise UserError(f'{path}: has {len(its_user_ids)} users, but metrics.json has {n_users}; {AGAIN}.')
    if its_user_ids != user_ids:
      raise UserError(f'{path}: has other users than the other rankings ({_first_difference(its_user_ids, user_ids)}); '
                      f'{AGAIN}.')
    _check_means(path, places[method], known[method])
  return Result(folder, found['protocol'], data, user_ids, places)


def check_comparable(results: Sequence[Result]) -> None:
  """Raises UserError, which names two folders and what differs, unless all are of one protocol, data set and users."""
  for other in results[1:]:
    first = results[0]
    if first.protocol['hash'] != other.protocol['hash']:
      differs = f'the protocols differ ({_differing_rules(first.protocol, other.protocol)})'
    elif first.data['fingerprint'] != other.data['fingerprint']:
      one, two = (f'{result.data["name"]} {result.data["fingerprint"]}' for result in (first, other))
      differs = f'the data sets differ ({one}, {two})'
    elif first.user_ids != other.user_ids:
      differs = f'the users differ ({_first_difference(first.user_ids, other.user_ids)})'
    else:
      continue
    raise UserError(f'{first.folder} and {other.folder}: cannot stand in one table: {differs}; evaluate both alike.')


def _metrics_of(folder: pathlib.Path) -> dict:
  """What metrics.json holds; raises UserError unless it is an object."""
  path = folder / 'metrics.json'
  if not folder.is_dir():
    raise UserError(f'{folder}: no such folder; name a folder that `calrec evaluate` wrote.')
  if not path.is_file():
    raise UserError(f'{folder}: has no metrics.json; name a folder that `calrec evaluate` wrote.')
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}).') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: is not JSON ({str(error).splitlines()[0]}); {AGAIN}.') from error
  if not isinstance(found, dict):
    raise UserError(f'{path}: holds a {type(found).__name__}, where an object is expected; {AGAIN}.')
  return found


def _check_protocol(folder: pathlib.Path, found: Mapping) -> None:
  rules = found.get('protocol')
  if not isinstance(rules, dict) or not all(isinstance(rules.get(key), str) for key in ('name', 'hash')):
    raise UserError(f'{folder}/metrics.json: a result without a protocol and its hash is refused; {AGAIN}.')
  if rules['hash'] != protocol_hash(rules):
    raise UserError(f'{folder}/metrics.json: the hash {rules["hash"]!r} does not fit the rules of its protocol, which give '
                    f'{protocol_hash(rules)}; {AGAIN}.')


def _read_places(path: pathlib.Path, n_items: int) -> tuple[list[str], Places]:
  """(user ids, places) of a rankings file; raises UserError, with the line, if it is truncated or broken."""
  user_ids, counts = [], []
  for number, line in json_lines.lines(path):
    # The top items are most of a line, and not needed. A quote inside a text is escaped, so this is the key itself.
    head, cut, _ = line.partition(b', "top": [')
    try:
      row = json.loads(head + b'}' if cut else line)
      user_id, better, tied = row['user_id'], row['better'], row['tied']
      if type(user_id) is not str or type(better) is not int or type(tied) is not int:
        raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise UserError(f'{path}: line {number}: expected {{"user_id", "target", "better", "tied", "top"}}; {AGAIN}.') from error
    if better < 0 or tied < 0 or better + tied >= n_items:
      raise UserError(f'{path}: line {number}: {better} better and {tied} tied of {n_items} items cannot be; {AGAIN}.')
    user_ids.append(user_id)
    counts.append((better, tied))
  if len(set(user_ids)) != len(user_ids):
    raise UserError(f'{path}: has {len(user_ids)} lines of {len(set(user_ids))} users; {AGAIN}.')
  if not user_ids:
    raise UserError(f'{path}: has no users; {AGAIN}.')
  return user_ids, Places(*np.array(counts, np.int64).T)


def _check_means(path: pathlib.Path, places: Places, means: Mapping) -> None:
  """Raises UserError if the rankings are not those that were measured: files of two runs in one folder."""
  for metric, value_U in expected_metrics(places.better_U, places.tied_U).items():
    told, mean = means.get(metric), float(value_U.mean())
    if isinstance(told, float | int) and not abs(told - mean) <= TOLERANCE:
      raise UserError(f'{path}: its {metric} is {mean:.6f}, but metrics.json says {told:.6f}: not of one run; {AGAIN}.')


def _first_difference(one: Sequence[str], other: Sequence[str]) -> str:
  if len(one) != len(other):
    return f'{len(one)} and {len(other)}'
  return next(f'such as {a!r} and {b!r}' for a, b in zip(one, other, strict=True) if a != b)


def _differing_rules(one: Mapping, other: Mapping, most: int = 3) -> str:
  """The rules that differ, as `split: 'test', 'validation'`, the first few."""
  def told(rules: Mapping, key: str) -> str:
    text = repr(rules[key]) if key in rules else 'none'
    return text if len(text) <= 60 else text[:59] + '…'

  keys = [key for key in dict.fromkeys([*one, *other]) if key != 'hash' and one.get(key) != other.get(key)]
  shown = [f'{key}: {told(one, key)}, {told(other, key)}' for key in keys[:most]]
  return '; '.join([*shown, f'and {len(keys) - most} more'] if len(keys) > most else shown)
