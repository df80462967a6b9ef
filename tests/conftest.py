"""What every test runs under: eight simulated CPU devices, float32 at the highest precision, strict broadcasting."""

import importlib.util
import os
import pathlib
import shutil
import signal
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

# All of it has to stand before jax is imported. Child processes of a test inherit it.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Without the second flag a program of several CPU devices that comes out of the compilation cache (below) may run its
# collectives in another order on each device, and never ends (seen with jax 0.10.2).
# The last two: programs of tiny arrays take far longer to compile than to run; this way a third of it.
_FLAGS = ('--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false '
          '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1')
if _FLAGS not in os.environ.get('XLA_FLAGS', ''):  # which pytest's own child processes have already
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAGS}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ['NUMBA_DISABLE_JIT'] = '1'  # ranx would compile itself for a minute; its Python gives the same at once
os.environ['EPATH_USE_TF'] = '0'  # as the command line has it; read once
_CACHE = os.environ.get('CALREC_TEST_CACHE') or pathlib.Path.home() / '.cache/calrec_jax_tests'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(_CACHE)
os.environ['JAX_COMPILATION_CACHE_MAX_SIZE'] = str(2**30)  # bytes; the oldest entries go first
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')  # more: see `tiny.READS_CACHE`
# An entry whose second file is missing (its writer was killed between the two) keeps jax from writing any other.
for _entry in pathlib.Path(_CACHE).glob('*-cache') if 'PYTEST_XDIST_WORKER' not in os.environ else ():
  if not _entry.with_name(_entry.name.removesuffix('-cache') + '-atime').exists():
    _entry.unlink(missing_ok=True)
# A run in the background may have these ignored, and so would all that its tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ['CALREC_VENV'] = sys.prefix  # launch/local_run.sh runs what is tested, whatever lies in the checkout's .venv
os.environ['PATH'] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get('PATH', '')])

import jax  # noqa: E402
import pytest  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture(scope='session')
def real_data() -> pathlib.Path:
  """The folder of real data beside the checkout (or at CALREC_REAL_DATA); the test is skipped where it is absent."""
  folder = pathlib.Path(os.environ.get('CALREC_REAL_DATA') or ROOT.parent / 'shared/data')
  if not folder.is_dir():
    pytest.skip(f'the real data is not at {folder}')
  return folder


@pytest.fixture(scope='session')
def chromium() -> str:
  """Where Chromium is; what asks for it is marked `chromium`."""
  return CHROMIUM


@pytest.fixture(scope='session')
def tiny_store(tmp_path_factory) -> pathlib.Path:
  """The store of `tiny.py`. Tests read it; what they write goes elsewhere."""
  import tiny
  return tiny.write_store(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def trained_run(tiny_store, tmp_path_factory) -> pathlib.Path:
  """A run of 36 steps (and of 12) on both data sets of the tiny store, which has learned what items are like. Read it only."""
  import tiny
  model_dir = tmp_path_factory.mktemp('trained_run') / 'run'
  tiny.train(tiny_store, model_dir, train_steps=36, optimizer=tiny.Optimizer(learning_rate=0.02, warmup_steps=2),
             schedule=tiny.Schedule(log_every=1, eval_every=0, save_every=12))
  return model_dir


def missing() -> dict[str, str]:
  """Markers of tests that cannot run here -> why not."""
  found = {} if CHROMIUM else {'chromium': 'Chromium is not on PATH'}
  return found if importlib.util.find_spec('apache_beam') else found | {'beam': 'Apache Beam is not in this environment'}


def pytest_collection_modifyitems(config, items) -> None:
  """Tests that lack Chromium or Apache Beam are not of this run; they are deselected, as a skip might be forbidden."""
  left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in missing())]
  if left_out:
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter) -> None:
  for marker, reason in missing().items():
    terminalreporter.write_line(f'{reason}: the tests marked `{marker}` were left out.')


def _fail_forbidden_skip(report) -> None:
  """With CALREC_STRICT_SKIPS a skip is a failure, so that a law cannot go unchecked unseen; T5X is not on PyPI."""
  if os.environ.get('CALREC_STRICT_SKIPS') != '1' or not report.skipped or hasattr(report, 'wasxfail'):
    return
  reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
  if 't5x' not in reason.lower():
    report.outcome = 'failed'
    report.longrepr = f'{reason}\nCALREC_STRICT_SKIPS=1: no test may be skipped here, except for T5X.'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  report = yield
  _fail_forbidden_skip(report)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  report = yield
  _fail_forbidden_skip(report)
  return report
