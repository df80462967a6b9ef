"""The jobs that begin with names: a checkpoint, a data set, a file of generations become objects, and the work is called."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from calrec_jax import provenance
from calrec_jax.data import histories, oracle
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.inference.generate import generate
from calrec_jax.inference.loading import load
from calrec_jax.text.item_tokens import load_item_tokens
from calrec_jax.text.templates import ItemTemplate


def load_data(data_dir: str | os.PathLike, name: str) -> Histories:
  """The histories folder of one data set. Raises UserError, with the names that are there, if it is not."""
  folder = pathlib.Path(data_dir) / name
  if not folder.is_dir():
    there = sorted(p.name for p in pathlib.Path(data_dir).iterdir() if p.is_dir()) if os.path.isdir(data_dir) else []
    raise UserError(f'{folder}: no such histories folder (there are: {", ".join(there) or "none"}); give DATA_DIR and the name '
                    'of one data set as MIXTURE_OR_TASK_NAME.')
  return histories.load(folder)


def infer(*, checkpoint: str, data_dir: str, task_name: str, out: str, sample: Callable[..., dict] = generate,
          dtype: str = 'auto', gin_text: Callable[[], str] = str) -> dict[str, Any]:
  """Samples item texts for the users of a data set into `out/generations.jsonl.gz`. The same call resumes.

  Args:
    checkpoint: a run's folder (its newest step) or one step's; it brings its vocabulary, texts and lengths.
    data_dir: holds the histories folders.
    task_name: the data set.
    out: the folder to write.
    sample: `generate` with its options set.
    dtype: computation, see `DecoderConfig`.
    gin_text: returns the operative configuration, for the record.

  Returns:
    The report of `generate`.
  """
  data = load_data(data_dir, task_name)
  loaded = load(checkpoint, dtype=dtype)
  vocabulary, found = loaded.vocabulary, loaded.found
  folder = pathlib.Path(out)
  with _folder(folder):
    report = sample(
        decoder=loaded.decoder, params=loaded.params, vocabulary=vocabulary, histories=data,
        item_tokens=load_item_tokens(pathlib.Path(data_dir) / task_name, data, loaded.template, vocabulary),
        out=folder / GENERATIONS,
        identity=f'{found.model_dir.name} step {found.step}, weights {fingerprint(loaded.params)[:16]}',
        max_prefix_length=loaded.lengths['inputs'], max_item_tokens=loaded.lengths['targets'])
  provenance.write(folder, gin_text=gin_text(), checkpoint=str(checkpoint), step=found.step, report=report,
                   data={data.name: data.fingerprint}, vocabulary=vocabulary.fingerprint,
                   template=dataclasses.asdict(loaded.template))
  provenance.write_scalars(folder, {f'infer/{name}': value for name, value in report.items() if name != 'split'})
  return report


@contextlib.contextmanager
def _folder(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder to write into; takes it away again if nothing was written. UserError if it cannot be made."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{folder}: cannot be written ({error.strerror}); choose another place.') from error
  try:
    yield
  finally:
    with contextlib.suppress(OSError):  # not empty: it holds results, or what the same call goes on from
      folder.rmdir()


def fingerprint(params: Any) -> str:
  """sha256 hex of a tree of arrays."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def rank(*, data_dir: str, task_name: str, template: ItemTemplate, out: str, generations: str | None = None,
         store: str | None = None, evaluate: Callable[..., dict] = evaluate,
         gin_text: Callable[[], str] = str) -> dict[str, Any]:
  """Ranks the whole catalogue for every user and judges the rankings, into the folder `out`.

  Args:
    data_dir: holds the histories folders.
    task_name: the data set.
    template: how an item becomes the text that BM25 indexes.
    out: the folder to write: `metrics.json` and `rankings-<method>.jsonl.gz`.
    generations: a file that `infer` wrote, or its folder; None: the baselines alone.
    store: a generated store, whose own probabilities give the ceiling; None: no ceiling.
    evaluate: `evaluation.evaluate.evaluate` with its options set.
    gin_text: returns the operative configuration, for the record.

  Returns:
    The metrics.
  """
  data = load_data(data_dir, task_name)
  ceiling = oracle.load_oracle(store, task_name).probabilities if store else None
  metrics = evaluate(histories=data, template=template, out=out, generations=generations, oracle=ceiling)
  provenance.write(out, gin_text=gin_text(), data={data.name: data.fingerprint}, generations=generations and str(generations))
  provenance.write_scalars(out, {f'{metrics["protocol"]["split"]}/{method}/{name}': value
                                 for method, values in metrics['methods'].items() for name, value in values.items()})
  return metrics
