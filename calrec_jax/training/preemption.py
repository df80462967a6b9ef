"""What ends a run early: SIGTERM, on which all processes save at one step; and the death of one, which ends the others."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # exit code: interrupted, the same command goes on


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
  """Yields `asked(step)`, to be called after every step: whether to save and leave now.

  One process leaves after the step in which SIGTERM comes. Of several, JAX's preemption service, which listens to the signal
  itself, picks the first step that none of them has passed: all get True at that one.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
    yield lambda step: event.is_set()
    return
  previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield lambda step: event.is_set()
  finally:
    signal.signal(signal.SIGTERM, previous)
