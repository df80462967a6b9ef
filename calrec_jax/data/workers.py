"""The parts of a job on the workers of Apache Beam, on this machine or on a cluster. Nothing else here imports Beam."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from calrec_jax.errors import UserError


def run(work: Callable[[Any], None], parts: Sequence[Any], *, options: Any = None, runner: Any = None) -> None:
  """Calls `work` with each part, on whichever worker takes it, and returns when all are done.

  Both are pickled: `work` is a function of a module, or a `functools.partial` of one. A part may be worked on twice, where a
  worker was lost, so what it writes has to be the same each time and appear whole.

  Args:
    work: what is done; it leaves its results in files.
    parts: what it is done to.
    options: Beam's PipelineOptions, or the flags to make them of, such as ['--runner=DirectRunner'].
    runner: Beam's runner, or its name, where `options` does not name it.

  Raises:
    UserError: Beam is not installed, or knows no such runner; or `work` raised one.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, WorkerOptions
  except ImportError as error:
    raise UserError(f'Apache Beam is not installed ({error}); install calrec_jax[beam].') from error
  if options is None or isinstance(options, list):
    options = PipelineOptions(options)
  of_workers = options.view_as(WorkerOptions)
  of_workers.default_sdk_harness_log_level = of_workers.default_sdk_harness_log_level or 'WARNING'
  try:
    pipeline = beam.Pipeline(runner=runner, options=options)
  except ValueError as error:
    raise UserError(f'Apache Beam refuses its options: {" ".join(str(error).split())}') from error
  try:
    with pipeline:  # Reshuffle: without it the parts would stay together, on one worker
      _ = pipeline | 'Parts' >> beam.Create(parts) | beam.Reshuffle() | 'Work' >> beam.Map(work)
  except Exception as error:  # of this process it is the worker's own; else each runner has its own, which ends in a traceback
    text = f'{"calrec_jax.errors.UserError: " * isinstance(error, UserError)}{error}'
    if told := re.search(r'calrec_jax\.errors\.UserError: (.+?)(?: \[while running .*)?$', text, re.MULTILINE):
      raise UserError(told[1]) from error
    raise
