"""Baselines that were made with held-out events, or from other data: their rankings are made anew, and compared."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from calrec_jax.data import json_lines
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.audit.findings import SERIOUS, Finding, finding, item_label, user_label
from calrec_jax.evaluation.audit.folders import Folder
from calrec_jax.evaluation.baselines import popularity, transitions
from calrec_jax.evaluation.protocols import PROTOCOLS, Protocol
from calrec_jax.evaluation.rankings import place

CHECK, OTHER_DATA = 'baselines', 'data of an evaluation'
BASELINES = {'popularity': popularity, 'transitions': transitions}
USERS = 500  # of each file, the first: enough to tell apart counts that differ by a tenth of the events


@dataclasses.dataclass(frozen=True)
class _Counting(Histories):
  """A data set whose train parts hold too much.

  Attributes:
    counted: up to the target of which split: `train` is as it should be.
  """

  counted: str = 'train'

  def visible(self, split: str) -> np.ndarray:
    """As `Histories.visible`, with the longer train part: of `test` all events."""
    if split != 'train' or self.counted == 'train':
      return super().visible(split)
    if self.counted == 'test':
      return np.diff(self.offsets)
    return np.maximum(super().visible('train'), super().visible(self.counted))


def check_evaluation(dataset: Histories, folder: Folder) -> Iterator[Finding]:
  """Checks an evaluation's data set, its targets, and its popularity and transitions.

  Raises UserError for a rankings file that is broken.
  """
  fingerprint = next(iter(folder.data.values()))
  if fingerprint != dataset.fingerprint:
    yield finding(OTHER_DATA, SERIOUS, f'{folder.path} was made with another data set ({next(iter(folder.data))}, fingerprint '
                  f'{fingerprint[:12]}) than {dataset.name} ({dataset.fingerprint[:12]}); audit it with the one, or evaluate '
                  'anew.', 1)
    return
  if folder.protocol.get('name') not in PROTOCOLS:
    return
  for name in BASELINES:
    path = folder.path / f'rankings-{name}.jsonl.gz'
    if path.is_file():
      yield from _check_rankings(dataset, folder, name, _rows(path, dataset))


def _rows(path: pathlib.Path, dataset: Histories) -> list[tuple[int, int, int, int]]:
  """(user, target, better, tied) of the first lines of a rankings file; -1 for an unknown user or item."""
  users, items = ({each: number for number, each in enumerate(ids)} for ids in (dataset.user_ids, dataset.item_ids))
  rows = []
  for number, line in itertools.islice(json_lines.lines(path, progress=False), USERS):
    try:
      row = json.loads(line)
      rows.append((users.get(row['user_id'], -1), items.get(row['target'], -1), int(row['better']), int(row['tied'])))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise UserError(f'{path}: line {number}: not a line of rankings ({type(error).__name__}: {str(error)[:80]}); make it '
                      'anew with `calrec evaluate`.') from error
  return rows


def _check_rankings(dataset: Histories, folder: Folder, name: str, rows: list[tuple[int, int, int, int]]) -> Iterator[Finding]:
  rules = folder.protocol
  protocol = Protocol(rules['name'], folder.split, 'kept' if rules.get('seen_items') == 'kept' else 'filtered')
  where = f'{folder.path}/rankings-{name}.jsonl.gz'
  seen_U = dataset.visible(folder.split)
  strange = [(user, target) for user, target, _, _ in rows
             if user < 0 or seen_U[user] < 2 or dataset.seen(user, folder.split)[-1] != target]
  if strange:
    yield finding(OTHER_DATA, SERIOUS, f'{len(strange)} of the first {len(rows)} targets in {where} are not the {folder.split} '
                  f'targets of {dataset.name}: it was made from other data. Evaluate anew.', len(strange),
                  (f'{user_label(dataset, user)}: {item_label(dataset, target) if target >= 0 else "an unknown item"}'
                   for user, target in strange if user >= 0))
    return
  allowed = {user: protocol.candidates(dataset, user) for user, *_ in rows}
  wrong = {}
  for counted in ('train', 'validation', 'test'):
    whole = _Counting(**{field.name: getattr(dataset, field.name) for field in dataclasses.fields(Histories)}, counted=counted)
    scorer = BASELINES[name].scorer(whole, folder.split)
    wrong[counted] = [(user, target) for user, target, *found in rows
                      if place(scorer(user), target, allowed[user]) != tuple(found)]
    if counted == 'train' and not wrong['train']:
      return
  fits = next((counted for counted, users in wrong.items() if not users), None)
  counts = {'validation': 'it fits counts that hold the validation targets too',
            'test': 'it fits counts over all events, held-out ones too',
            None: 'nor does it fit counts over all events, so that it was made from other data'}[fits]
  yield finding(CHECK, SERIOUS, f'{where} does not fit the train parts of {dataset.name} for {len(wrong["train"])} of the '
                f'first {len(rows)} users; {counts}. A baseline may know train parts alone: evaluate anew.',
                len(wrong['train']), (f'{user_label(dataset, user)}: target {item_label(dataset, target)}'
                                      for user, target in wrong['train']))
