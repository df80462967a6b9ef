"""What a run's results depend on, written beside them: versions, seeds, gin text, data fingerprints."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Mapping

from calrec_jax import outputs, storage

PACKAGES = ('calrec_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'seqio', 'gin-config', 'numpy', 'tokenizers',
            'scipy', 'duckdb')


def versions() -> dict[str, str]:
  """Name to version of Python, the platform, and the packages that results depend on."""
  found = {'python': platform.python_version(), 'platform': platform.platform()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = 'not installed'
  return found


def write(folder: str | os.PathLike, *, gin_text: str, **facts: object) -> None:
  """Writes `config.gin` and `run.json` (command, versions and `facts`: seeds, fingerprints, ...) into a run's folder."""
  with outputs.new_file(storage.join(folder, 'config.gin')) as scratch:
    scratch.write_text(gin_text)
  outputs.write_json(storage.join(folder, 'run.json'), {'command': sys.argv, 'versions': versions(), **facts})


def places(folder: pathlib.Path, named: str) -> list[pathlib.Path]:
  """Where a path that a record in `folder` names may lie: from the working folder, then from each folder above the record."""
  return [pathlib.Path(named), *(parent / named for parent in folder.absolute().parents)]


def write_scalars(folder: str | os.PathLike, scalars: Mapping[str, float]) -> None:
  """Writes numbers as TensorBoard events of step 0, for the jobs that have no steps."""
  from clu import metric_writers  # imports TensorFlow: only when there is something to write
  with storage.Workplace(folder) as work, contextlib.closing(
      metric_writers.create_default_writer(os.fspath(work.folder), asynchronous=False)) as writer:
    writer.write_scalars(0, scalars)
