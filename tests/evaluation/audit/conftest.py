"""A clean data set, and a whole chain of folders on the tiny store: checkpoint, texts, rankings, index."""

import pathlib
import shutil
import types

import pytest
from audit_shop import shop

from calrec_jax import runs
from calrec_jax.data.histories import Histories
from calrec_jax.data.histories import load as load_histories
from calrec_jax.inference.generate import generate
from calrec_jax.inference.loading import load
from calrec_jax.ranking.index import build_index
from calrec_jax.text.templates import ItemTemplate


@pytest.fixture(scope='session')
def clean() -> Histories:
  return shop()


@pytest.fixture(scope='session')
def whole_chain(tiny_store, trained_run, tmp_path_factory) -> types.SimpleNamespace:
  """`data`, `checkpoint`, and folders `infer`, `evaluate`, `index` of the tiny store's games. Read them only."""
  folder, data_dir = tmp_path_factory.mktemp('audited'), tiny_store / 'data'
  few = {'n_samples': 8, 'max_new_tokens': 14, 'users_per_batch': 8}
  runs.infer(checkpoint=str(trained_run), data_dir=str(data_dir), task_name='games', out=str(folder / 'infer'),
             sample=lambda **given: generate(**given, **few))
  runs.rank(data_dir=str(data_dir), task_name='games', template=ItemTemplate(), out=str(folder / 'evaluate'),
            generations=str(folder / 'infer'))
  data = load_histories(data_dir / 'games')
  build_index(data.item_ids, data.items, load(trained_run), embed=False).save(folder / 'index')
  return types.SimpleNamespace(data=data_dir / 'games', checkpoint=trained_run, infer=folder / 'infer',
                               evaluate=folder / 'evaluate', index=folder / 'index')


@pytest.fixture
def chain(whole_chain, tmp_path) -> types.SimpleNamespace:
  """A copy of what inference and evaluation wrote, to be changed; the copied evaluation names the copied texts."""
  for name in ('infer', 'evaluate', 'index'):
    shutil.copytree(getattr(whole_chain, name), tmp_path / name)
  record: pathlib.Path = tmp_path / 'evaluate/run.json'
  record.write_text(record.read_text().replace(str(whole_chain.infer), str(tmp_path / 'infer')))
  return types.SimpleNamespace(**{**vars(whole_chain), **{name: tmp_path / name for name in ('infer', 'evaluate', 'index')}})
