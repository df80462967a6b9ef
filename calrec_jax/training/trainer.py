"""The train loop: build, restore, then step, log, evaluate, save."""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from calrec_jax import provenance, storage
from calrec_jax.errors import UserError
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.head import BLOCK
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, OnePass, RowOptions
from calrec_jax.training import checkpoints, partitioning, resuming, trainable
from calrec_jax.training.best import LOSSES, RETRIEVAL, Best
from calrec_jax.training.inputs import Inputs
from calrec_jax.training.journal import Journal
from calrec_jax.training.meter import Meter, count, memory_line
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.preemption import PREEMPTED, termination
from calrec_jax.training.train_step import TrainState, make_train_step, new_state
from calrec_jax.training.trainable import IsTrained
from calrec_jax.training.validation import Judge, Validation


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When a run logs, evaluates, saves and ends, in steps.

  Attributes:
    log_every: a line of metrics.
    eval_every: validation; 0: only at the end.
    eval_histories: of the validation split, so many, evenly spread; None: all; 0: no validation.
    save_every: a checkpoint; the last step is saved always.
    keep: newest checkpoints that are kept, and the best one beside them.
    best_metric: by which a step is the best: `ndcg@10` or `recall@10` of dense retrieval (with `_unseen`: among items that the
      user had not bought), or a loss of the validation,
      `loss`, `nig`, `tt` or `ut`. `MODEL_DIR/best` names that step wherever a checkpoint is asked for.
    patience: training ends after so many evaluations in turn that are no better than the best; None: never.
    profile_steps: so many steps are traced, from the third on, for TensorBoard's profiler: into `MODEL_DIR/profile`.
  """

  log_every: int = 20
  eval_every: int = 200
  eval_histories: int | None = 1000
  save_every: int = 200
  keep: int = 3
  best_metric: str = 'ndcg@10'
  patience: int | None = None
  profile_steps: int = 0

  def __post_init__(self):
    for name, least in (('log_every', 1), ('eval_every', 0), ('save_every', 1), ('keep', 1), ('patience', 1),
                        ('eval_histories', 0), ('profile_steps', 0)):
      value = getattr(self, name)
      if value is not None and value < least:
        raise UserError(f'schedule.{name} = {value}: give at least {least}.')
    if self.best_metric not in (*RETRIEVAL, *LOSSES):
      raise UserError(f'schedule.best_metric = {self.best_metric!r}: choose one of {", ".join((*RETRIEVAL, *LOSSES))}.')
    if self.patience and not self.eval_every:
      raise UserError(f'schedule.patience = {self.patience}: needs evaluations; set schedule.eval_every.')


def train(*, model_dir: str, train_steps: int, batch_size: int, inputs: Inputs, decoder: DecoderConfig, objective: Objective,
          rows: RowOptions, optimizer: Optimizer, mesh: MeshShape, schedule: Schedule, judge: Judge | None = None,
          initial_checkpoint: str | None = None, frozen: Sequence[str] = (), head_block: int = BLOCK, microbatches: int = 1,
          seed: int = 0, allow_changes: bool = False, gin_text: Callable[[], str] = str) -> dict[str, float]:
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
    schedule: when to log, evaluate, save and end.
    judge: `evaluation.dense.dense_metrics`, or what else turns embeddings of users and texts into validation metrics.
    initial_checkpoint: a run's folder, its `best`, or one step's, whose weights this stage starts from.
    frozen: names of parameters that are not trained, such as `embedding`, `mlp` or `query`.
    head_block: target positions of a device at which the head runs at once, see `head`.
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
  if head_block < 1:
    raise UserError(f'train.head_block = {head_block}: give at least 1.')
  resuming.check_folder(model_dir)
  sources = inputs.load()
  logging.info('%s', inputs.shares(sources))
  decoder = with_vocabulary(decoder, inputs)
  trained = trainable.is_trained(decoder, frozen)
  bos = inputs.vocabulary.bos_id is not None
  model = TwoTower(Decoder(decoder), objective, bos=bos, head_block=head_block, longest_history=inputs.length,
                   longest_text=inputs.max_item_tokens + bos)
  plan = BatchPlan(inputs.corpus(sources, 'train'), batch_size=batch_size, length=inputs.length, options=rows, seed=seed)
  held_out = OnePass(inputs.corpus(sources, 'validation'), batch_size=batch_size, length=inputs.length,
                     options=dataclasses.replace(rows, targets='last'), max_histories=schedule.eval_histories)
  description = {'decoder': decoder.shape(), 'optimizer': optimizer.name, 'frozen': sorted(frozen),
                 'pretrained': resuming.lineage(model_dir, initial_checkpoint), **inputs.description(sources), 'seed': seed,
                 'settings': resuming.settings(
                     train_steps=train_steps, batch_size=batch_size, objective=objective, rows=rows, optimizer=optimizer,
                     dropout=decoder.dropout, param_dtype=decoder.param_dtype),
                 'gin': gin_text(), 'versions': provenance.versions()}
  transformation = optimizer.build(train_steps)
  make_state, shardings = new_state(model, transformation, plan.shapes, seed, device_mesh, trained,
                                    averages=optimizer.average_decay > 0)
  state, best = resuming.restore_or_start(storage.place(model_dir), make_state, shardings, initial_checkpoint, decoder, trained,
                                          description, allow_changes, Best(schedule.best_metric))
  train_step = make_train_step(model, transformation, device_mesh, shardings, trained, microbatches, optimizer.average_decay)
  validation = Validation(held_out, model, device_mesh, shardings.params, judge)
  memory = memory_line(state, trained)
  meter = Meter(plan, decoder, list(device_mesh.devices.flat))
  with _open_run(model_dir, inputs, schedule.keep, best) as store:
    if jax.process_index() == 0:
      users = {source.histories.name: len(source.histories.user_ids) for source in sources}
      provenance.write(model_dir, gin_text=description['gin'], seed=seed, data=description['data'], users=users,
                       rates=description['rates'], rows=plan.report, shapes=dataclasses.asdict(plan.shapes),
                       mesh=dict(device_mesh.shape), parameters=count(state.params), memory=memory)
    logging.info('%s', memory)
    logging.info('%d training targets; %.1f%% of joint and %.1f%% of alone positions hold tokens.', plan.report['targets'],
                 100 * plan.report['joint_fill'], 100 * plan.report['alone_fill'])
    with Journal(model_dir, meter, optimizer.rate(train_steps), start=int(state.step), train_steps=train_steps,
                 profile_steps=schedule.profile_steps) as journal:
      return _loop(state, best, plan, train_step, validation, store=store, journal=journal, mesh=device_mesh,
                   trained=trained, description=description, schedule=schedule, train_steps=train_steps, model_dir=model_dir)


def _loop(state: TrainState, best: Best, plan: BatchPlan, train_step: Callable, validation: Validation, *,
          store: checkpoints.Checkpoints, journal: Journal, mesh: jax.sharding.Mesh, trained: IsTrained,
          description: dict[str, Any], schedule: Schedule, train_steps: int, model_dir: str) -> dict[str, float]:
  """Steps from where the state is to the end; returns the last validation metrics."""
  every = lambda steps, done: bool(steps) and done % steps == 0
  exhausted = lambda best: schedule.patience is not None and best.waited >= schedule.patience
  last_eval: dict[str, float] = {}
  if exhausted(best):
    logging.info('This run ended early, see `schedule.patience`; its best step is %d.', best.step)
    return last_eval
  with termination() as asked_to_leave:
    for step, batch in _prefetched(plan, mesh, int(state.step), train_steps):
      state, metrics = train_step(state, batch)
      journal.add(step, metrics)
      done = step + 1
      if every(schedule.log_every, done) or done == train_steps:
        journal.log(done)
      leaves = asked_to_leave(done) and done < train_steps
      evaluates = len(validation) and not leaves and (done == train_steps or every(schedule.eval_every, done))
      improves = False
      if evaluates:
        journal.meter.check()  # what is judged is good
        last_eval = validation(state.judged)
        journal.validated(done, last_eval)
        best = best.after(done, last_eval)
        improves = best.step == done
      if done == train_steps or every(schedule.save_every, done) or leaves or improves or exhausted(best):
        journal.meter.check()  # and what is saved
        journal.push()
        store.save(done, *resuming.parts(state, trained), description | {'validation': last_eval, 'best': best.to_json()},
                   best_step=best.step)
      if leaves:
        store.wait()
        logging.warning('Terminated at step %d, which is saved in %s; the same command goes on from it.', done, model_dir)
        raise SystemExit(PREEMPTED)
      if exhausted(best):
        logging.info('Ends at step %d: %s was best at step %d, %d evaluations ago. %s/best names that step.', done, best.metric,
                     best.step, best.waited, model_dir)
        break
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


def _open_run(model_dir: str, inputs: Inputs, keep: int, best: Best) -> checkpoints.Checkpoints:
  """The run's checkpoints; the vocabulary is written beside them."""
  folder = storage.place(model_dir)
  try:
    if not storage.is_bucket(model_dir):
      folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      inputs.vocabulary.save(folder / checkpoints.VOCABULARY_FILE)
  except OSError as error:
    raise UserError(f'{folder}: cannot be written ({error.strerror}); choose another MODEL_DIR.') from error
  return checkpoints.Checkpoints(folder, keep=keep, best_step=best.step)


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
