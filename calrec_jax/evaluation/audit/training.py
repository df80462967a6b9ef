"""Held-out events among the examples that a model was trained on."""

import dataclasses
import json
import pathlib
import types
from collections.abc import Iterator, Sequence

import numpy as np

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import Histories
from calrec_jax.data.tfds_builder import visible_histories
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS, Finding, finding, item_label, user_label
from calrec_jax.evaluation.audit.folders import HISTORIES, TRAINING, Folder
from calrec_jax.evaluation.audit.held_out import SPLITS, numbered, targets
from calrec_jax.evaluation.baselines.popularity import in_train
from calrec_jax.text.corpus import Source, build_corpus
from calrec_jax.text.item_tokens import ItemTokens
from calrec_jax.text.templates import ItemTemplate

CHECK = 'held-out events in training'
UNCHECKED = 'training data not found'


@dataclasses.dataclass(frozen=True)
class TrainedOn:
  """A data set that a model was, or may have been, trained on.

  Attributes:
    histories: the data set.
    where: who says so, in words.
  """

  histories: Histories
  where: str


def trained_on(dataset: Histories, dataset_path: pathlib.Path, folders: Sequence[Folder]
               ) -> tuple[list[TrainedOn], list[Finding]]:
  """(the data set, and each that a run names or that is given, once; a note for each that cannot be found).

  A run names data sets by fingerprint. Each is looked for among the folders given, in the run's DATA_DIR, and beside `dataset`.
  """
  loaded = {dataset.fingerprint: dataset}
  by, notes = {dataset.fingerprint: ["this project's train split"]}, []
  for folder in folders:
    if folder.kind == HISTORIES:
      data = histories_lib.load(folder.path)
      loaded.setdefault(data.fingerprint, data)
      by.setdefault(data.fingerprint, []).append(f'the folder {folder.path}')
  for folder in (each for each in folders if each.kind == TRAINING):
    for name, fingerprint in folder.data.items():
      if fingerprint not in loaded:
        data = _found(name, fingerprint, folder, dataset_path)
        if data is None:
          notes.append(finding(UNCHECKED, NOTE, f'{folder.path} was trained on {name} (fingerprint {fingerprint[:12]}), which '
                               'is not found; give its folder too, so that it is audited.', 1))
          continue
        loaded[fingerprint] = data
      by.setdefault(fingerprint, []).append(f'the run {folder.path}')
    if 'initial_checkpoint' in folder.lost:
      notes.append(finding(UNCHECKED, NOTE, f'{folder.path} began with {folder.lost["initial_checkpoint"]}, which is not '
                           'there; give that run too, so that its data is audited.', 1))
  return [TrainedOn(loaded[fingerprint], ' and '.join(dict.fromkeys(who))) for fingerprint, who in by.items()], notes


def _found(name: str, fingerprint: str, folder: Folder, dataset_path: pathlib.Path) -> Histories | None:
  """The data set of this fingerprint, if it is in the run's DATA_DIR or beside the audited one."""
  places = [folder.links['data_dir']] if 'data_dir' in folder.links else []
  for place in (*places, dataset_path.resolve().parent):
    path = place / name
    if not path.is_dir():
      continue
    try:
      told = json.loads((path / 'dataset.json').read_text(encoding='utf-8')).get('fingerprint')
    except (OSError, ValueError, AttributeError):
      told = fingerprint  # nothing tells: the content does
    if told == fingerprint and (data := histories_lib.load(path)).fingerprint == fingerprint:
      return data
  return None


def check_training(dataset: Histories, trained: TrainedOn) -> Iterator[Finding]:
  """Finds targets of `dataset` among a data set's training examples: same user, same item, and same time where both have times.

  An item that is in the user's own train part of `dataset` too is passed over: it may be bought again.
  """
  data = trained.histories
  shown_E = data.among_first(shown_in_training(data))
  n_items = len(dataset.item_ids)
  users_E = numbered(data.user_ids, dataset.user_ids)[data.event_users[shown_E]]
  items_E = numbered(data.item_ids, dataset.item_ids)[data.events[shown_E]]
  known_E = (users_E >= 0) & (items_E >= 0)
  codes_E = users_E * n_items + items_E
  own = in_train(dataset)
  own_codes = dataset.event_users[own] * n_items + dataset.events[own]
  for split in SPLITS:
    held = targets(dataset, split)
    codes_H = held.users_H * n_items + held.items_H
    leaked_H = np.isin(codes_H, codes_E[known_E]) & ~np.isin(codes_H, own_codes)
    if dataset.timestamps is not None and data.timestamps is not None:
      there = set(zip(codes_E[known_E].tolist(), data.timestamps[shown_E][known_E].tolist(), strict=True))
      times_H = dataset.timestamps[held.places_H]
      leaked_H &= [pair in there for pair in zip(codes_H.tolist(), times_H.tolist(), strict=True)]
    if leaked_H.any():
      what = 'itself' if data.fingerprint == dataset.fingerprint else f'{data.name} (fingerprint {data.fingerprint[:12]})'
      yield finding(
          CHECK, SERIOUS, f'{leaked_H.sum()} of {len(leaked_H)} {split} targets of {dataset.name} are training examples of '
          f'{what}, named by {trained.where}. Train on the folder that is evaluated, or on data without these users.',
          leaked_H.sum(), (f'{user_label(dataset, user)}: {item_label(dataset, item)}' for user, item in zip(
              held.users_H[leaked_H].tolist(), held.items_H[leaked_H].tolist(), strict=True)))


def shown_in_training(histories: Histories) -> np.ndarray:
  """int64 [U]: how many of a history's first events the train split shows, as `text/` and `tasks/` make examples."""
  n_items = len(histories.item_ids)
  one_token = ItemTokens(np.zeros(n_items, np.int32), np.arange(n_items + 1))  # what an item's tokens are does not matter
  vocabulary = types.SimpleNamespace(encode=lambda text: [0], bos_id=None, eos_id=0)
  corpus = build_corpus([Source(histories, one_token)], template=ItemTemplate(), vocabulary=vocabulary, split='train',
                        max_item_tokens=1)
  shown_U = np.diff(corpus.offsets)
  for user, events in visible_histories(histories, 'train'):  # of the SeqIO Tasks
    shown_U[user] = max(shown_U[user], len(events))
  return shown_U
