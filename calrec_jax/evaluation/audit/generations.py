"""Generated texts, or candidates, that are of other users, another data set or another split."""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence

from calrec_jax.data import json_lines
from calrec_jax.data.histories import FIELDS, Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.audit.findings import SERIOUS, Finding, finding, item_label, user_label
from calrec_jax.evaluation.audit.folders import EVALUATION, Folder
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.ranking.candidates import candidate_files

MADE_FOR, USERS, COPIES = 'what generations are for', 'users of generations', 'generations of another user'
LONG = 4  # distinct values that a list must have to tell users apart


def check_inference(dataset: Histories, folder: Folder) -> Iterator[Finding]:
  """Checks the files of `calrec infer`: the data set, the users, and lists that two users share bit for bit.

  Raises UserError for a broken file.
  """
  if folder.data and dataset.fingerprint not in folder.data.values():
    name, fingerprint = next(iter(folder.data.items()))
    yield finding(MADE_FOR, SERIOUS, f'{folder.path} was made for another data set ({name}, fingerprint {fingerprint[:12]}) '
                  f'than {dataset.name} ({dataset.fingerprint[:12]}); run `calrec infer` anew.', 1)
    return
  files = [folder.path / GENERATIONS] if (folder.path / GENERATIONS).is_file() else []
  for path in (*files, *candidate_files(folder.path).values()):
    yield from _check_file(dataset, path, folder.split or 'test')


def check_made_for(folders: Sequence[Folder]) -> Iterator[Finding]:
  """Finds evaluations of generations that were made for another split, or for another data set."""
  by_path = {folder.path.resolve(): folder for folder in folders}
  for evaluation in (each for each in folders if each.kind == EVALUATION and 'generations' in each.links):
    path = evaluation.links['generations']
    made = by_path.get((path.parent if path.is_file() else path).resolve())
    if made is None:
      continue
    if made.split not in (None, evaluation.split):
      yield finding(MADE_FOR, SERIOUS, f'{evaluation.path} judges the {evaluation.split} split by {made.path}, which was made '
                    f'for the {made.split} split: evaluate that, or run `calrec infer` for this one.', 1)
    if made.data and not set(evaluation.data.values()) & set(made.data.values()):
      told = ' and '.join(f'{name} ({mark[:12]})' for each in (evaluation, made) for name, mark in each.data.items())
      yield finding(MADE_FOR, SERIOUS, f'{evaluation.path} judges {made.path}, which was made for another data set ({told}); '
                    'run `calrec infer` anew.', 1)


def _check_file(dataset: Histories, path: pathlib.Path, split: str) -> Iterator[Finding]:
  number_of = {user_id: user for user, user_id in enumerate(dataset.user_ids)}
  texts_I = [tuple(item[field] for field in FIELDS) for item in dataset.items]
  seen_U = dataset.visible(split)
  unknown, twice, seen, by_list = [], [], set(), {}
  for user_id, digest in _lists(path):
    user = number_of.get(user_id)
    if user_id in seen:
      twice.append(user_id)
    elif user is None:
      unknown.append(user_id)
    elif digest is not None and seen_U[user] >= 2:
      by_list.setdefault(digest, []).append(user)
    seen.add(user_id)
  for found, what in ((unknown, f'are not in {dataset.name}'), (twice, 'have two lines or more')):
    if found:
      yield finding(USERS, SERIOUS, f'{len(found)} users of {path} {what}: it was made for other users. Run `calrec infer` '
                    'anew.', len(found), (f'user {user_id}' for user_id in found))
  newest = lambda user: int(dataset.seen(user, split)[-2])
  # Users whose newest items differ in text have different prefixes, however much of their histories was cut.
  groups = [users for users in by_list.values() if len({texts_I[newest(user)] for user in users}) > 1]
  if groups:
    n_users = sum(map(len, groups))
    yield finding(
        COPIES, SERIOUS, f'{n_users} users of {path} have the lists of other users, equal in every text and number, although '
        'their histories differ. Run `calrec infer` anew.', n_users,
        (', '.join(f'{user_label(dataset, user)} (newest item {item_label(dataset, newest(user))})' for user in users[:2])
         for users in groups))


def _lists(path: pathlib.Path) -> Iterator[tuple[str, bytes | None]]:
  """(user id, a digest of the lists; None where they are short) of each line. Raises UserError for a broken one."""
  for number, row in json_lines.objects(path, json_lines.BadLines(path, None), progress=False):
    names, values = (row.get('texts'), row.get('logprobs')) if 'texts' in row else (row.get('item_ids'), row.get('scores'))
    good = (isinstance(row.get('user_id'), str) and isinstance(names, list) and isinstance(values, list)
            and len(names) == len(values) and all(type(each) is str for each in names)
            and all(type(each) in (int, float) for each in values))
    if not good:
      raise UserError(f'{path}: line {number}: expected "user_id", and texts with their log-probabilities or items with '
                      'their scores; make the file anew with `calrec infer`.')
    is_long = len(set(names)) >= LONG and len(set(values)) >= LONG
    yield row['user_id'], hashlib.sha256(json.dumps([names, values]).encode()).digest() if is_long else None
