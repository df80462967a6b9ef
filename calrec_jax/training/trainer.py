"""The train loop: build, restore, then step, log, evaluate, save."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from clu import metric_writers
from jax.experimental import multihost_utils

from calrec_jax import provenance
from calrec_jax.errors import UserError
from calrec_jax.models import lora
from calrec_jax.models.decoder import Decoder, boxed_params
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, OnePass, RowOptions
from calrec_jax.training import checkpoints, partitioning, trainable
from calrec_jax.training.inputs import Inputs
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import TrainState, make_eval_step, make_train_step, new_state
from calrec_jax.training.trainable import IsTrained

PREEMPTED = 75  # exit code after SIGTERM: saved, start again to go on
CHECKED = ('nig', 'tt', 'ut', 'gradient_norm')  # what must be finite in every step


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When a run logs, evaluates and saves, in steps.

  Attributes:
    log_every: a line of metrics.
    eval_every: validation loss; 0: only at the end.
    eval_histories: of the validation split, so many, evenly spread; None: all.
    save_every: a checkpoint; the last step is saved always.
    keep: newest checkpoints that are kept.
  """

  log_every: int = 20
  eval_every: int = 200
  eval_histories: int | None = 1000
  save_every: int = 200
  keep: int = 3


def train(*, model_dir: str, train_steps: int, batch_size: int, inputs: Inputs, decoder: DecoderConfig, objective: Objective,
          rows: RowOptions, optimizer: Optimizer, mesh: MeshShape, schedule: Schedule, initial_checkpoint: str | None = None,
          frozen: Sequence[str] = (), head_chunks: int = 1, microbatches: int = 1, seed: int = 0,
          allow_changes: bool = False, gin_text: Callable[[], str] = str) -> dict[str, float]:
  """Finetunes (or trains from random weights) one stage, and goes on from the newest checkpoint in `model_dir` if there is one.

  Args:
    model_dir: the run's folder: checkpoints, configuration, TensorBoard events.
    train_steps: of this stage.
    batch_size: rows of the global batch.
    inputs: the data and its vocabulary.
    decoder: the model's shape; `vocab_size` None is chosen by the vocabulary.
    objective: weights and options of the losses.
    rows: how histories become rows.
    optimizer: the update rule.
    mesh: how devices are laid out.
    schedule: when to log, evaluate and save.
    initial_checkpoint: a run's folder, or one step's, whose weights this stage starts from.
    frozen: names of parameters that are not trained, such as `embedding`, `mlp` or `query`.
    head_chunks: slices in which the head runs, see `TwoTower`.
    microbatches: parts in which a batch is computed one after the other, with the gradient of the whole, see `gradient_cache`.
    seed: of the weights, the order of the data and dropout.
    allow_changes: go on although a setting is another than the run was begun with.
    gin_text: returns the operative configuration, for the record.

  Returns:
    The last validation metrics.

  Raises:
    UserError: wrong input, with what to do. SystemExit(75): SIGTERM came, the step is saved.
  """
  device_mesh = mesh.build()
  partitioning.check_batch_size(batch_size, device_mesh, microbatches)
  sources = inputs.load()
  decoder = with_vocabulary(decoder, inputs)
  bos = inputs.vocabulary.bos_id is not None
  trained = trainable.is_trained(decoder, frozen)
  model = TwoTower(Decoder(decoder), objective, bos=bos, head_chunks=head_chunks)
  plan = BatchPlan(inputs.corpus(sources, 'train'), batch_size=batch_size, length=inputs.length, options=rows, seed=seed)
  validation = OnePass(inputs.corpus(sources, 'validation'), batch_size=batch_size, length=inputs.length,
                       options=dataclasses.replace(rows, targets='last'), max_histories=schedule.eval_histories)
  description = {'decoder': decoder.shape(), 'optimizer': optimizer.name, 'frozen': sorted(frozen),
                 'pretrained': _lineage(model_dir, initial_checkpoint), **inputs.description(sources), 'seed': seed,
                 'settings': _settings(train_steps=train_steps, batch_size=batch_size, objective=objective, rows=rows,
                                       optimizer=optimizer, dropout=decoder.dropout, param_dtype=decoder.param_dtype),
                 'gin': gin_text(), 'versions': provenance.versions()}

  transformation = optimizer.build(train_steps)
  make_state, shardings = new_state(model, transformation, plan.shapes, seed, device_mesh, trained)
  _check_folder(model_dir)
  state = _restore_or_start(pathlib.Path(model_dir), make_state, shardings, initial_checkpoint, decoder, description,
                            allow_changes)
  memory = memory_line(state, trained)
  train_step = make_train_step(model, transformation, device_mesh, shardings, trained, microbatches)
  eval_step = make_eval_step(model, device_mesh, shardings.params)
  rate = optimizer.rate(train_steps)

  start, last_eval = int(state.step), {}
  with contextlib.ExitStack() as stack:
    store = stack.enter_context(_open_run(model_dir, inputs, schedule.keep))
    if jax.process_index() == 0:
      provenance.write(model_dir, gin_text=description['gin'], seed=seed, data=description['data'], rows=plan.report,
                       shapes=dataclasses.asdict(plan.shapes), mesh=dict(device_mesh.shape), parameters=count(state.params),
                       memory=memory)
    logging.info('%s', memory)
    logging.info('%d training targets; %.1f%% of joint and %.1f%% of alone positions hold tokens.', plan.report['targets'],
                 100 * plan.report['joint_fill'], 100 * plan.report['alone_fill'])
    writer = stack.enter_context(contextlib.closing(metric_writers.create_default_writer(
        model_dir, just_logging=jax.process_index() > 0, asynchronous=False)))
    terminated = stack.enter_context(_termination())
    bar = stack.enter_context(tqdm.tqdm(total=train_steps, initial=start, desc='train', unit='step', file=sys.stderr,
                                        disable=None, mininterval=1.0))
    meter = Meter(plan)
    for step, batch in _prefetched(plan, device_mesh, start, train_steps):
      state, metrics = train_step(state, batch)
      bar.update()
      meter.add(step, metrics)
      done = step + 1
      logs = done % schedule.log_every == 0 or done == train_steps
      if logs:
        values = meter.read()
        writer.write_scalars(done, {f'train/{k}': v for k, v in values.items()} | {'train/learning_rate': float(rate(step))})
        bar.set_postfix_str(f'loss {values["loss"]:.3f} nig {values["nig"]:.3f} tt {values["tt"]:.3f} ut {values["ut"]:.3f} '
                            f'{values["spans_per_second"]:.0f} spans/s {values["tokens_per_second"]:.0f} tokens/s')
      stop = _all_stop(terminated, logs) and done < train_steps
      evaluates = (len(validation) and not stop
                   and (done == train_steps or (schedule.eval_every and done % schedule.eval_every == 0)))
      saves = done == train_steps or done % schedule.save_every == 0 or stop
      if evaluates or saves:
        meter.check()  # what is judged and saved is good
      if evaluates:
        last_eval = evaluate_loss(eval_step, state.params, validation, device_mesh, objective)
        writer.write_scalars(done, {f'validation/{k}': v for k, v in last_eval.items()})
        logging.info('step %d: validation %s', done, {k: round(v, 4) for k, v in last_eval.items()})
        meter.restart()
      if saves:
        store.save(done, state.params, _rest(state), description | {'validation': last_eval})
      if stop:
        store.wait()
        logging.warning('Terminated at step %d, which is saved in %s; the same command goes on from it.', done, model_dir)
        raise SystemExit(PREEMPTED)
  return last_eval


def with_vocabulary(decoder: DecoderConfig, inputs: Inputs) -> DecoderConfig:
  """The decoder with its number of embedding rows: the vocabulary's size, rounded up so that any mesh divides it."""
  size = inputs.vocabulary.vocab_size
  if decoder.vocab_size is None:
    return dataclasses.replace(decoder, vocab_size=-(-size // 128) * 128)
  if decoder.vocab_size < size:
    raise UserError(f'decoder.vocab_size = {decoder.vocab_size} is below the {size} ids of the vocabulary; leave it out, or '
                    'raise it.')
  return decoder


def count(params: Any) -> int:
  """How many numbers a tree of arrays holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def memory_line(state: TrainState, trained: IsTrained) -> str:
  """What parameters and optimizer state take up on each device, to be read before training begins."""
  def held(tree: Any) -> str:
    sizes = collections.Counter()
    for leaf in jax.tree.leaves(tree):
      if jnp.issubdtype(leaf.dtype, jnp.floating):
        sizes[leaf.dtype.name] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return ' + '.join(f'{size / 1e6:,.1f} MB of {name}' for name, size in sizes.items()) or 'nothing'
  n_devices = len(jax.tree.leaves(state.params)[0].sharding.device_set)
  n_trained = count(trainable.split(state.params, trained)[0])
  return (f'{count(state.params):,} parameters, {n_trained:,} of them trained. '
          f'On each of {n_devices} device(s): parameters {held(state.params)}; optimizer state {held(state.opt_state)}.')


class Meter:
  """Means of metrics, and rates, since the last reading; stops the run where a number is none."""

  def __init__(self, plan: BatchPlan):
    self._plan = plan
    self.restart()

  def restart(self) -> None:
    """Begins to count anew; what was added is forgotten."""
    self._time, self._metrics = time.monotonic(), {}

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    self._metrics[step] = metrics

  def check(self) -> None:
    """Waits for the newest step. Raises UserError for the first step with a loss term or gradient that is NaN or infinite."""
    self._metrics = jax.device_get(self._metrics)
    for step, row in self._metrics.items():
      if wrong := [f'{name} = {float(row[name])}' for name in CHECKED if name in row and not np.isfinite(row[name])]:
        ids = self._plan.example_ids(step)
        raise UserError(f'Step {step + 1}: {", ".join(wrong)}. Its examples: {", ".join(ids[:8])}'
                        f'{f" and {len(ids) - 8} more" if len(ids) > 8 else ""}. Nothing of it is saved: lower LEARNING_RATE '
                        'or optimizer.clip_norm, and go on from the checkpoint before with '
                        '--gin.train.allow_changes=True.')

  def read(self) -> dict[str, float]:
    """Means over the steps since the last reading, and counts a second; waits for the newest step. Raises as `check` does."""
    self.check()
    rows, seconds = list(self._metrics.values()), time.monotonic() - self._time
    values = {name: float(sum(row[name] for row in rows) / len(rows)) for name in rows[0]} if rows else {}
    for name in ('spans', 'tokens'):
      values[f'{name}_per_second'] = values[name] * len(rows) / seconds
    values['steps_per_second'] = len(rows) / seconds
    self.restart()
    return values


def evaluate_loss(eval_step: Callable, params: Any, batches: OnePass, mesh: jax.sharding.Mesh,
                  objective: Objective) -> dict[str, float]:
  """Loss terms over all batches: L_NIG as a mean over target tokens, the contrastive terms over spans; `loss` is theirs."""
  sharding = partitioning.batch_sharding(mesh)
  weight_of = {'nig': 'target_tokens', 'tt': 'spans', 'ut': 'spans'}
  sums, weights = dict.fromkeys(weight_of, 0.0), dict.fromkeys(weight_of, 0.0)
  for step in tqdm.trange(len(batches), desc='validation', leave=False, file=sys.stderr, disable=None):
    batch = partitioning.global_batch(lambda rows, step=step: batches.batch(step, rows), batches.shapes.B, sharding)
    metrics = {name: float(value) for name, value in jax.device_get(eval_step(params, batch)).items()}
    for name, weight in weight_of.items():
      sums[name] += metrics[name] * metrics[weight]
      weights[name] += metrics[weight]
  means = {name: sums[name] / max(weights[name], 1) for name in weight_of}
  return {'loss': float(objective.total(**means)), **means}


def _settings(**settings: Any) -> dict[str, Any]:
  """What a run's numbers depend on, by the names that gin knows, as JSON has it."""
  flat = {}
  for name, value in settings.items():
    if dataclasses.is_dataclass(value):
      flat |= {f'{name}.{field}': found for field, found in dataclasses.asdict(value).items()}
    else:
      flat[name] = value
  return flat


def _check_changes(model_dir: pathlib.Path, there: dict[str, Any], here: dict[str, Any], allowed: bool) -> None:
  """Raises UserError where a run in this folder was begun with other data or settings, unless that is allowed."""
  def facts(found: dict[str, Any]) -> dict[str, Any]:
    factors = {name: value for name, value in found['decoder'].items() if name.startswith('lora')}
    known = ('data', 'task_feature_lengths', 'seed', 'optimizer', 'frozen')
    return {name: found[name] for name in known} | {'decoder': factors} | found.get('settings', {})
  old, new = facts(there), facts(here)
  changed = {name: f'{name} is {old[name]} there, {new[name]} here' for name in old if name in new and old[name] != new[name]}
  if not changed:
    return
  listed = '; '.join(changed.values())
  other_arrays = changed.keys() & {'optimizer', 'optimizer.state_dtype', 'frozen', 'decoder'}  # these cannot be read
  if allowed and not other_arrays:
    logging.warning('Goes on with other settings: %s.', listed)
    return
  way_out = '' if other_arrays else ', or go on all the same with --gin.train.allow_changes=True'
  raise UserError(f'{model_dir}: this run was begun with other {", ".join(changed)} ({listed}); choose another MODEL_DIR'
                  f'{way_out}.')


def _rest(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'rng': state.rng, 'opt_state': state.opt_state}


def _check_folder(model_dir: str) -> None:
  """Raises UserError for a folder that holds something other than a training run."""
  folder = pathlib.Path(model_dir)
  if folder.exists() and not folder.is_dir():
    raise UserError(f'{folder}: is a file; choose another MODEL_DIR.')
  if folder.is_dir() and any(folder.iterdir()) and not (folder / checkpoints.VOCABULARY_FILE).exists():
    raise UserError(f'{folder}: the folder is in use, and not by a training run; choose another MODEL_DIR.')


def _open_run(model_dir: str, inputs: Inputs, keep: int) -> checkpoints.Checkpoints:
  """The run's checkpoints; the vocabulary is written beside them."""
  folder = pathlib.Path(model_dir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      inputs.vocabulary.save(folder / checkpoints.VOCABULARY_FILE)
  except OSError as error:
    raise UserError(f'{folder}: cannot be written ({error.strerror}); choose another MODEL_DIR.') from error
  return checkpoints.Checkpoints(folder, keep=keep)


def _lineage(model_dir: str, initial_checkpoint: str | None) -> dict[str, Any] | None:
  """The pretrained model that a run goes back to, as `calrec import` described it; None if there is none."""
  begun = checkpoints.newest_step(model_dir) is not None
  source = model_dir if begun else initial_checkpoint
  return checkpoints.find(source).description.get('pretrained') if source else None


def _restore_or_start(model_dir: pathlib.Path, make_state: Callable[[], TrainState], shardings: TrainState,
                      initial_checkpoint: str | None, decoder: DecoderConfig, description: dict[str, Any],
                      allow_changes: bool) -> TrainState:
  """The state to go on from: this run's newest checkpoint, else the weights of `initial_checkpoint`, else random weights."""
  expected = {'decoder': decoder, 'vocabulary': description['vocabulary'], 'template': description['template']}
  target = jax.eval_shape(make_state)
  abstract_params = checkpoints.abstract(target.params, shardings.params)
  if checkpoints.newest_step(model_dir) is not None:
    found = checkpoints.find(model_dir)
    if found.description['data'] is None:
      raise UserError(f'{model_dir}: holds an imported model; choose another MODEL_DIR, and give this one as '
                      'INITIAL_CHECKPOINT_PATH.')
    checkpoints.check_fits(found, **expected)
    _check_changes(model_dir, found.description, description, allow_changes)
    abstract_rest = checkpoints.abstract(_rest(target), _rest(shardings))
    restored = checkpoints.load(found, params=abstract_params, rest=abstract_rest)
    logging.info('Goes on from step %d of %s.', found.step, model_dir)
    return TrainState(params=restored['params'], **restored['rest'])
  if initial_checkpoint is None:
    return make_state()
  found = checkpoints.find(initial_checkpoint)
  checkpoints.check_fits(found, **expected)
  logging.info('Starts from the weights of step %d of %s.', found.step, found.model_dir)
  theirs = found.decoder_config(param_dtype=decoder.param_dtype)
  if theirs.shape() == decoder.shape():  # factors, if there are any, are trained on
    return make_state(checkpoints.load(found, params=abstract_params)['params'])
  boxed = {'decoder': boxed_params(theirs)}
  mesh = jax.tree.leaves(shardings.params)[0].mesh
  there = checkpoints.abstract(nn.unbox(boxed), partitioning.shardings(boxed, mesh))
  # What was loaded has no name here: merged weights replace it, and memory holds one of the two when the state is made.
  return make_state({'decoder': lora.merge(checkpoints.load(found, params=there)['params']['decoder'], theirs)[0]})


def _prefetched(plan: BatchPlan, mesh: jax.sharding.Mesh, start: int, stop: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
  """(step, global batch) of each step; the next one is built while the device works."""
  sharding = partitioning.batch_sharding(mesh)
  build = lambda step: partitioning.global_batch(lambda rows: plan.batch(step, rows), plan.shapes.B, sharding)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(build, start) if start < stop else None
    for step in range(start, stop):
      batch = ahead.result()
      if step + 1 < stop:
        ahead = pool.submit(build, step + 1)
      yield step, batch


@contextlib.contextmanager
def _termination() -> Iterator[Any]:
  """Yields an event that SIGTERM sets, where this is the main thread."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event
    return
  previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, previous)


def _all_stop(terminated: threading.Event, logs: bool) -> bool:
  """Whether to save and leave after this step. Several processes agree on it in the steps that log: all leave at one step."""
  if jax.process_count() == 1:
    return terminated.is_set()
  return logs and bool(multihost_utils.process_allgather(np.asarray(terminated.is_set())).any())
