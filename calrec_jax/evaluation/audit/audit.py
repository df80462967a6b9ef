"""The audit: looks for what a data set, or a run on it, lets a model know of the events that it is judged by.

A check is a function that yields findings; each has a file of its own here. A clean run has none.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.audit.baselines import check_evaluation
from calrec_jax.evaluation.audit.catalogue import check_index
from calrec_jax.evaluation.audit.exact import check_exact
from calrec_jax.evaluation.audit.findings import Finding, as_result
from calrec_jax.evaluation.audit.folders import EVALUATION, INDEX, INFERENCE, Folder, open_all
from calrec_jax.evaluation.audit.generations import check_inference, check_made_for
from calrec_jax.evaluation.audit.id_order import check_id_order
from calrec_jax.evaluation.audit.texts import check_texts
from calrec_jax.evaluation.audit.times import check_future, check_order
from calrec_jax.evaluation.audit.training import check_training, trained_on
from calrec_jax.evaluation.audit.users import check_shared_users, check_twins
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.inference.loading import load


def audit(dataset: str | os.PathLike, runs: Sequence[str | os.PathLike] = (), *, checkpoint: str | None = None) -> dict:
  """Audits a histories folder, and runs on it.

  Args:
    dataset: the histories folder that models are judged on.
    runs: folders of this project (`folders.open_folder`): training runs, what `calrec infer` and `calrec evaluate` wrote,
      indexes, further histories folders that a model was trained on. Those that their records lead to are audited too.
    checkpoint: a run's folder, or one step's. With it a few users' texts in each folder of generations are scored anew.

  Returns:
    JSON values, see `findings.as_result`; `findings.as_text` shows them.

  Raises:
    UserError: a folder that is none of this project, a broken file, a checkpoint that is not the generations', or one without
      generations among the runs.
  """
  data, folders = histories_lib.load(dataset), open_all(runs)
  if checkpoint is not None and not any((folder.path / GENERATIONS).is_file() for folder in folders):
    raise UserError(f'--checkpoint {checkpoint}: there are no generations to score; give a folder of `calrec infer` as RUN.')
  findings = [*check_data(data), *check_runs(data, pathlib.Path(dataset), folders)]
  if checkpoint is not None:
    loaded = load(checkpoint)
    findings += [each for folder in folders if folder.kind == INFERENCE for each in check_exact(data, folder, loaded)]
  return as_result(str(dataset), [str(folder.path) for folder in folders], findings)


def check_data(dataset: Histories) -> Iterator[Finding]:
  """The checks that need the data set alone."""
  for check in (check_order, check_twins, check_id_order, check_future, check_texts):
    yield from check(dataset)


def check_runs(dataset: Histories, path: pathlib.Path, folders: Sequence[Folder]) -> Iterator[Finding]:
  """The checks of folders; `path` is where the data set lies."""
  trained, notes = trained_on(dataset, path, folders)
  for each in trained:
    yield from check_training(dataset, each)
    yield from check_shared_users(dataset, each.histories, each.where)
  yield from notes
  checks = {EVALUATION: check_evaluation, INFERENCE: check_inference, INDEX: check_index}
  for folder in folders:
    if folder.kind in checks:
      yield from checks[folder.kind](dataset, folder)
  yield from check_made_for(folders)
