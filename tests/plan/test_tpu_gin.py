"""Law 12: each shipped pair of a model and a TPU topology compiles for it and fits its memory."""

import math
import pathlib

import gin
import jax
import pytest

from calrec_jax import configurables
from calrec_jax.models.decoder import abstract_params
from calrec_jax.plan import planning, topology

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'gin/tpu').glob('*.gin'))


@pytest.fixture(scope='module', autouse=True)
def libtpu():
  """The compiler at its least effort: a third of the time, and all that is checked here is the same, but for a few per cent."""
  topology.prepare()
  jax.config.update('jax_exec_time_optimization_effort', -1.0)
  with jax.default_matmul_precision('default'):  # bfloat16 has no other
    yield
  jax.config.update('jax_exec_time_optimization_effort', 0.0)
  gin.clear_config()


def settings(*files, **bindings):
  """(training, mesh, topology) of run files, as `calrec plan` reads them."""
  configurables.parse(['gin/runs/stage1.gin', *files], [], [f'{name}={value}' for name, value in bindings.items()], whole=False)
  training, mesh = configurables.training_settings()
  return training, mesh, topology.parse(configurables.plan_options().topology)


def check(report, training):
  """Law 12, and that a step neither gathers whole parameters over anything but `fsdp` nor calls the host."""
  assert report['fits'], report['memory']
  assert report['callbacks'] == []
  largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(training.decoder)))
  for one in report['collectives']:
    if one['kind'] == 'all-gather' and one['times'] * one['bytes'] >= 2 * largest:
      assert one['axes'] == ['fsdp'], one


@pytest.mark.parametrize('file', FILES)
def test_every_pair_compiles_and_fits(file):
  training, mesh, where = settings(file)
  report = planning.plan_training(training, where, mesh)
  check(report, training)
  assert report['chips'] == where.chips and 0 < report['mfu'] <= 1
  assert report['memory']['parameters'] > 0 and report['memory']['activations'] > 0


def test_the_pairs_cover_every_chip():
  chips = {settings(file)[2].chip.name for file in FILES}
  assert chips == {'v4', 'v5e', 'v5p', 'v6e'}
