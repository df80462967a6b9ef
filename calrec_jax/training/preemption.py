"""What ends a run early: SIGTERM, on which all processes save at one step; and the death of one, which ends the others."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # exit code: interrupted, the same command goes on
HEARTBEAT_SECONDS = 30  # a process that is silent for so long counts as dead


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


def join_processes() -> None:
  """Joins the other processes of a run: on a Cloud TPU pod JAX finds them; elsewhere the environment says where they are.

  That is JAX_COORDINATOR_ADDRESS, CALREC_NUM_PROCESSES and CALREC_PROCESS_ID. A process that dies ends the others within a
  minute: those that wait for it in vain are aborted by JAX.
  """
  known = [os.environ.get(name) for name in ('CALREC_NUM_PROCESSES', 'CALREC_PROCESS_ID')]
  num_processes, process_id = (int(text) if text else None for text in known)
  jax.distributed.initialize(num_processes=num_processes, process_id=process_id,
                             heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def is_lost_peer(error: Exception) -> bool:
  """Whether an error of JAX says that another process of the run is gone."""
  if not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
    return False
  return any(sign in str(error) for sign in ('Gloo', 'heartbeat', 'Connection closed', 'Connection reset', 'UNAVAILABLE'))
