"""What a run tells while it goes: a line of progress, TensorBoard curves, a trace for the profiler."""

import contextlib
import logging
import sys
from collections.abc import Callable

import jax
import tqdm
from clu import metric_writers

from calrec_jax import storage
from calrec_jax.training.meter import Meter, progress_line

PROFILE_FOLDER = 'profile'


class Journal:
  """The record of a run, as a context. On a terminal a bar shows the progress, elsewhere each reading is a line of its own."""

  def __init__(self, model_dir: str, meter: Meter, rate: Callable[[int], float], *, start: int, train_steps: int,
               profile_steps: int = 0):
    self.meter, self._rate, self._start, self._train_steps = meter, rate, start, train_steps
    self._model_dir, self._profile_steps, self._profiling = model_dir, profile_steps, False
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> 'Journal':
    self._work = self._stack.enter_context(storage.Workplace(self._model_dir))
    self._writer = self._stack.enter_context(contextlib.closing(metric_writers.create_default_writer(
        str(self._work.folder), just_logging=jax.process_index() > 0, asynchronous=False)))
    self._bar = self._stack.enter_context(tqdm.tqdm(total=self._train_steps, initial=self._start, desc='train', unit='step',
                                                    file=sys.stderr, disable=None, mininterval=1.0))
    self._stack.callback(self._end_profile)
    self.meter.restart()
    return self

  def __exit__(self, *_: object) -> None:
    self._stack.close()

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """One step was begun; the first two, which compile, are not traced."""
    self.meter.add(step, metrics)
    self._bar.update()
    if self._profile_steps and step == self._start + 1:
      jax.block_until_ready(metrics)
      jax.profiler.start_trace(str(self._work.folder / PROFILE_FOLDER))
      self._profiling = True
    elif self._profiling and step == self._start + 1 + self._profile_steps:
      jax.block_until_ready(metrics)
      self._end_profile()

  def log(self, done: int) -> None:
    """Reads the meter after `done` steps."""
    values = self.meter.read()
    self._writer.write_scalars(done, {f'train/{name}': value for name, value in values.items()}
                               | {'train/learning_rate': float(self._rate(done - 1))})
    self._writer.flush()
    self._work.push(every=storage.PUSH_SECONDS)
    line = progress_line(values, self._train_steps - done)
    if self._bar.disable:
      logging.info('step %d of %d: %s', done, self._train_steps, line)
    else:
      self._bar.set_postfix_str(line)

  def validated(self, done: int, values: dict[str, float]) -> None:
    """An evaluation was made; its time counts in no rate."""
    self._writer.write_scalars(done, {f'validation/{name}': value for name, value in values.items()})
    self._writer.flush()
    logging.info('step %d: validation %s', done, ', '.join(f'{name} {value:.4f}' for name, value in values.items()))
    self.meter.restart()

  def push(self) -> None:
    """Before a checkpoint: a run that goes on from there does not write again what was told up to it."""
    self._work.push()

  def _end_profile(self) -> None:
    if self._profiling:
      jax.profiler.stop_trace()
      self._profiling = False
      logging.info('%d steps are traced in %s: tensorboard --logdir %s', self._profile_steps,
                   storage.join(self._model_dir, PROFILE_FOLDER), self._model_dir)
