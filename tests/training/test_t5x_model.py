"""CALRec in T5X: the losses and gradients of `calrec train`; T5X's own scripts train, go on, infer and evaluate."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from refusals import refused

pytest.importorskip('t5x', reason='T5X is not installed; it is not on PyPI (README: T5X)')

import seqio  # noqa: E402
import test_partitioning  # noqa: E402
from t5x import optimizers, trainer  # noqa: E402
from t5x import partitioning as t5x_partitioning  # noqa: E402
from t5x import utils as t5x_utils  # noqa: E402

from calrec_jax import cli  # noqa: E402
from calrec_jax.inference.likelihood import log_likelihoods  # noqa: E402
from calrec_jax.inference.loading import load  # noqa: E402
from calrec_jax.models import decoding, head  # noqa: E402
from calrec_jax.models.two_tower import TwoTower  # noqa: E402
from calrec_jax.training import partitioning, t5x_model  # noqa: E402
from calrec_jax.training.optimizer import Optimizer  # noqa: E402
from calrec_jax.training.partitioning import MeshShape  # noqa: E402
from calrec_jax.training.t5x_model import CALRecModel, of_batch  # noqa: E402
from calrec_jax.training.train_step import make_train_step, new_state  # noqa: E402
from calrec_jax.training.validation import mean_losses  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
LENGTHS = {'inputs': 130, 'targets': 20}  # rows of 150 tokens: two or three histories each
TRACE = optax.trace(0.0)  # an optimizer whose state is the gradient
TERMS = ('loss', 'nig', 'tt', 'ut', 'tt_accuracy', 'ut_accuracy', 'spans', 'target_tokens', 'tokens')


def make_model(store, lengths=LENGTHS, **changes) -> CALRecModel:
  options = {'decoder': tiny.DECODER, 'objective': tiny.OBJECTIVE, 'optimizer_def': optimizers.OptaxWrapper(TRACE)}
  return CALRecModel(tiny.inputs(store, task_feature_lengths=lengths), **options | changes)


def make_batch(model, rows=8, *, task='stage1_mixture', split='train', pack=True, lengths=LENGTHS, seed=1):
  converter = model.FEATURE_CONVERTER_CLS(pack=pack, use_custom_packing_ops=False)
  dataset = seqio.get_dataset(task, lengths, dataset_split=split, shuffle=pack, seed=seed, feature_converter=converter)
  return next(dataset.batch(rows).as_numpy_iterator())


def make_partitioner(submesh=(1, 2, 1, 1)):
  rules = t5x_partitioning.standard_logical_axis_rules(additional_rules=t5x_model.additional_axis_rules())
  return t5x_partitioning.PjitPartitioner(num_partitions=None, model_parallel_submesh=submesh, logical_axis_rules=rules)


def t5x_step(model, batch, submesh=(1, 2, 1, 1), num_microbatches=None):
  """(parameters before, metrics, gradients) of one step of T5X's trainer, on all eight devices."""
  partitioner = make_partitioner(submesh)
  shapes = {name: array.shape for name, array in batch.items()}
  initializer = t5x_utils.TrainStateInitializer(model.optimizer_def, model.get_initial_variables, shapes, partitioner)
  state = initializer.from_scratch(jax.random.PRNGKey(0))
  params = jax.tree.map(np.asarray, state.params)
  stepper = trainer.Trainer(
      model, state, partitioner, [], None, initializer.train_state_axes, jax.random.PRNGKey(1),
      learning_rate_fn=lambda step: 1.0, num_microbatches=num_microbatches)
  with stepper:
    state, metrics = stepper._partitioned_train_step(state, batch)
  return params, {name: np.asarray(metrics[name].compute()) for name in TERMS}, state.param_states.trace


def numbers(metrics, gradients):
  leaves = jax.tree_util.tree_leaves_with_path(flax.core.unfreeze(gradients))
  return {name: np.asarray(metrics[name]) for name in TERMS} | {
      jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope='module')
def model(tiny_store):
  return make_model(tiny_store)


@pytest.fixture(scope='module')
def batch(model):
  return make_batch(model)


@pytest.fixture(scope='module')
def stepped(model, batch):
  return t5x_step(model, batch)


@pytest.fixture(scope='module')
def expected(model, batch, stepped):
  """The step of `calrec train` from the same parameters on the same batch, on one device."""
  mesh = MeshShape(1).build(jax.devices()[:1])
  shapes = model.FEATURE_CONVERTER_CLS(pack=True).shapes(LENGTHS)
  make_state, shardings = new_state(model.module, TRACE, dataclasses.replace(shapes, B=8), 0, mesh)
  state = make_state(jax.tree.map(jnp.asarray, dict(stepped[0])))
  step = make_train_step(model.module, TRACE, mesh, shardings)
  state, metrics = step(state, partitioning.global_batch(
      lambda rows: {name: array[rows] for name, array in of_batch(batch).items()}, 8, partitioning.batch_sharding(mesh)))
  return numbers(metrics, state.opt_state.trace)


def test_losses_and_gradients_are_those_of_calrec_train(batch, stepped, expected):
  assert (batch['span_texts'] > 0).sum() > len(batch['span_texts'])
  assert test_partitioning.differing(numbers(*stepped[1:]), expected) == []
  assert all(np.abs(value).max() > 0 for name, value in expected.items() if 'accuracy' not in name)
  assert test_partitioning.unsharded(stepped[2], {'model': 2}) == []


def test_slots_of_a_row_taken_for_slots_of_the_batch_are_noticed(model, batch, expected, monkeypatch):
  monkeypatch.setattr(t5x_model, 'of_batch', lambda batch: batch)
  assert {'tt', 'ut', 'loss'} <= set(test_partitioning.differing(numbers(*t5x_step(model, batch)[1:]), expected))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tiny_store, batch, expected):
  found = t5x_step(make_model(tiny_store, microbatches=2), batch)
  assert test_partitioning.differing(numbers(*found[1:]), expected) == []


def test_t5x_own_parts_of_a_batch_are_refused(model, batch):
  refused(lambda: t5x_step(model, batch, num_microbatches=2), 'num_microbatches', 'CALRecModel.microbatches')


def test_constraints_hold_on_the_mesh_of_t5x(model, batch, stepped, monkeypatch):
  seen, plain = [], head._batch_devices
  monkeypatch.setattr(head, '_batch_devices', lambda: seen.append(plain()) or seen[-1])
  t5x_step(model, batch)
  assert seen[-1] == 4  # the first are of the parameters' making
  jax.eval_shape(lambda: model.loss_fn(stepped[0], batch, None)[0])
  assert seen[-1] == 1  # on no mesh


def test_dropout_is_in_training_alone(tiny_store, batch):
  model = make_model(tiny_store, decoder=dataclasses.replace(tiny.DECODER, dropout=0.3))
  params = model.get_initial_variables(jax.random.key(0), {name: array.shape for name, array in batch.items()})['params']
  trained = jax.jit(lambda rng: model.loss_fn(params, batch, rng)[0])
  evaluated = float(jax.jit(lambda: model.eval_fn(params, batch)[0])())
  assert len({float(trained(jax.random.key(1))), float(trained(jax.random.key(2))), evaluated}) == 3
  without = make_model(tiny_store)
  assert evaluated == float(jax.jit(lambda: without.eval_fn(params, batch)[0])())


def test_metrics_of_several_batches_are_those_of_validation(model, batch, stepped):
  batches = [batch, {name: array[:3] for name, array in make_batch(model, seed=2).items()}]
  terms = [jax.jit(model.module.apply)({'params': stepped[0]}, of_batch(each))[1] for each in batches]
  metrics = [jax.jit(model.eval_fn)(stepped[0], each)[1] for each in batches]
  merged = {name: metrics[0][name].merge(metrics[1][name]).compute() for name in ('nig', 'tt', 'ut', 'spans')}
  whole = mean_losses(terms, tiny.OBJECTIVE)
  for name in ('nig', 'tt', 'ut'):
    np.testing.assert_allclose(merged[name], whole[name], rtol=1e-5)
    assert abs(whole[name] - np.mean([float(each[name]) for each in terms])) > 1e-4
  assert merged['spans'] == np.mean([(each['span_texts'] > 0).sum() for each in batches])


@pytest.fixture(scope='module')
def reading(tiny_store, trained_run):
  """A model, the parameters of a run that has learned, and one history a row."""
  loaded = load(trained_run, dtype='float32')
  model = make_model(tiny_store, tiny.LENGTHS, optimizer_def=None)
  batch = make_batch(model, task='books', split='test', pack=False, lengths=tiny.LENGTHS)
  return loaded, {'decoder': loaded.params}, model, batch


def teacher_forced(model, params, batch, tokens_BT):
  """(argmax, log-probabilities), both [B, T], of each written token, by full passes over prefix and text."""
  lengths_B, T = np.argmax(batch['loss_weights'] != 0, axis=1) + 1, tokens_BT.shape[1]
  size = lengths_B.max() + T
  whole = np.zeros((len(tokens_BT), size), np.int32)
  for row, length in enumerate(lengths_B):
    whole[row, :length] = batch['tokens'][row, :length]
    whole[row, length:length + T] = tokens_BT[row]
  positions = np.tile(np.arange(size, dtype=np.int32), (len(whole), 1))
  rows = {'tokens': whole, 'segments': np.ones_like(whole), 'positions': positions}
  logits_BLV = np.asarray(jax.jit(model._compute_logits)(params, rows))
  at = lengths_B[:, None] - 1 + np.arange(T)[None]
  logits_BTV = np.take_along_axis(logits_BLV, at[..., None], axis=1)
  logprobs = np.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[..., None], axis=-1)[..., 0]
  allowed = t5x_model.writable(model.output_vocabulary, logits_BLV.shape[-1])
  return np.where(allowed, logits_BTV, -np.inf).argmax(axis=-1), logprobs


def until_end(tokens_BT, eos):
  """bool [B, T]: the tokens of a text, its end included."""
  ended = np.cumsum(tokens_BT == eos, axis=1)
  return (ended == 0) | ((ended == 1) & (tokens_BT == eos))


def test_predictions_are_the_argmax_of_full_passes(reading):
  loaded, params, model, batch = reading
  tokens_BT, aux = jax.device_get(jax.jit(model.predict_batch_with_aux)(params, batch))
  best, logprobs = teacher_forced(model, params, batch, tokens_BT)
  written = until_end(tokens_BT, loaded.vocabulary.eos_id)
  assert (best == tokens_BT)[written].all() and not tokens_BT[~written].any() and (~written).any()
  np.testing.assert_allclose(aux['scores'], (logprobs * written).sum(axis=1), atol=1e-4)
  assert loaded.vocabulary.decode(tokens_BT[0].tolist()).startswith(' Title: books')
  wrong = {**batch, 'loss_weights': np.roll(batch['loss_weights'], 1, axis=1)}  # the prefix runs into the target
  assert (jax.device_get(jax.jit(model.predict_batch)(params, wrong)) != tokens_BT).any()


def test_samples_come_most_probable_first_with_their_log_probabilities(tiny_store, reading):
  loaded, params, _, batch = reading
  model = make_model(tiny_store, tiny.LENGTHS, n_samples=4, temperature=1.0)
  sampled = lambda seed: jax.device_get(jax.jit(model.predict_batch_with_aux)(params, batch, jax.random.PRNGKey(seed)))
  tokens_BT, aux = sampled(0)
  assert aux['samples'].shape[:2] == (len(tokens_BT), 4) and (aux['samples'][:, 0] == tokens_BT).all()
  assert (np.diff(aux['sample_scores'], axis=1) <= 0).all() and (aux['scores'] == aux['sample_scores'][:, 0]).all()
  assert len(np.unique(aux['samples'][0], axis=0)) > 1 and (sampled(1)[1]['samples'] != aux['samples']).any()
  for n in range(4):
    tokens = aux['samples'][:, n]
    logprobs = teacher_forced(model, params, batch, tokens)[1] * until_end(tokens, loaded.vocabulary.eos_id)
    np.testing.assert_allclose(aux['sample_scores'][:, n], logprobs.sum(axis=1), atol=1e-4)


def test_scores_are_the_exact_log_likelihoods_of_the_targets(reading):
  loaded, params, model, batch = reading
  scores_B, towers = jax.device_get(jax.jit(lambda: model.score_batch(params, batch, return_intermediates=True))())
  lengths_B = np.argmax(batch['loss_weights'] != 0, axis=1) + 1
  n_target = batch['loss_weights'].sum(axis=1).astype(int) - 1
  targets = np.zeros((len(scores_B), 1, n_target.max()), np.int32)
  for row, length in enumerate(lengths_B):
    targets[row, 0, :n_target[row]] = batch['tokens'][row, length:length + n_target[row]]
  prefix = decoding.prefill(loaded.decoder, loaded.by_layer, batch['tokens'], lengths_B, bos=False)
  exact = log_likelihoods(loaded.decoder, loaded.by_layer, prefix, targets, n_target[:, None], eos_id=loaded.vocabulary.eos_id)
  np.testing.assert_allclose(scores_B, exact[:, 0], rtol=1e-5)
  np.testing.assert_allclose(towers['user'][0], prefix.user_UD, atol=1e-5)
  run = lambda method: jax.jit(lambda: model.module.apply({'params': params}, of_batch(batch), method=method))()
  embedded = run(TwoTower.embed)
  np.testing.assert_allclose(towers['target'][0], embedded.target_BED[:, 0], atol=1e-6)
  nll = run(TwoTower.rows)[0]
  np.testing.assert_allclose(-scores_B.sum(), nll, rtol=1e-5)


def test_packed_rows_have_no_single_prediction(model, batch, stepped):
  for call in (model.score_batch, model.predict_batch):
    with pytest.raises(ValueError, match='pack = False'):
      call(stepped[0], batch)


def test_what_t5x_has_no_place_for_is_refused(tiny_store):
  for name, value in (('lora_rank', 2), ('param_dtype', 'bfloat16')):
    decoder = dataclasses.replace(tiny.DECODER, **{name: value})
    refused(lambda decoder=decoder: make_model(tiny_store, decoder=decoder), f'decoder.{name}', 'calrec train')
  for option in ({'name': 'adafactor'}, {'state_dtype': 'bfloat16'}, {'average_decay': 0.9}):
    refused(lambda option=option: t5x_model.optimizer_def(Optimizer(**option), 10), f'optimizer.{next(iter(option))}')
  refused(lambda: make_model(tiny_store, n_samples=2), 'n_samples', 'temperature above 0')
  refused(lambda: make_model(tiny_store / 'nowhere'), 'vocabulary')


def restored(model, batch, checkpoint: pathlib.Path):
  """The parameters that T5X itself reads from a checkpoint."""
  partitioner, shapes = make_partitioner(), {name: array.shape for name, array in batch.items()}
  config = t5x_utils.RestoreCheckpointConfig(path=str(checkpoint), mode='specific', dtype='float32', strict=False)
  initializer = t5x_utils.TrainStateInitializer(None, model.get_initial_variables, shapes, partitioner)
  state, _ = t5x_utils.create_checkpoint_manager_and_restore(
      initializer, partitioner, config, str(checkpoint), None, use_orbax=True)
  return state.params


def check_same(model, batch, ours, theirs):
  """Both parameters are the same bits, and have the same loss."""
  flat = lambda tree: {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  ours, theirs = jax.tree.map(np.asarray, dict(ours)), jax.tree.map(np.asarray, flax.core.unfreeze(theirs))
  assert flat(ours).keys() == flat(theirs).keys()
  assert all(np.array_equal(flat(ours)[name], leaf) for name, leaf in flat(theirs).items())
  loss = jax.jit(model.module.apply)({'params': ours}, of_batch(batch))[0]
  assert float(jax.jit(model.eval_fn)(theirs, batch)[0]) == float(loss)


def test_t5x_reads_an_exported_checkpoint(model, batch, trained_run, tmp_path):
  assert cli.main(['export', '--checkpoint', str(trained_run), '--format', 't5x', '--out', str(tmp_path / 'out')]) == 0
  check_same(model, batch, {'decoder': load(trained_run).params}, restored(model, batch, tmp_path / 'out/checkpoint_36'))


def t5x_run(script: str, gin_file: str, *bindings: str) -> str:
  """Runs one of T5X's scripts on four devices, two of them a replica; returns its log."""
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=4')  # the rest, too: see conftest
  env = os.environ | tiny.READS_CACHE | {'XLA_FLAGS': flags, 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path[1:]])}
  command = [sys.executable, '-m', f't5x.{script}', f'--gin_file=gin/t5x/{gin_file}.gin', *tiny.gin(bindings)]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stderr


@pytest.fixture(scope='module')
def chain(tiny_store, tmp_path_factory):
  """Stage I, stage II from its checkpoint, inference in three modes and evaluation, each by T5X's own script."""
  out = tmp_path_factory.mktemp('t5x')
  common = [f"DATA_DIR='{tiny_store / 'data'}'", f"VOCABULARY='{tiny_store / 'vocabulary.json'}'",
            'MODEL_PARALLEL_SUBMESH=(1, 2, 1, 1)', 'BATCH_SIZE=8', f'TASK_FEATURE_LENGTHS={LENGTHS}', *tiny.DECODER_GIN]
  training = [*common, 'CHECKPOINT_PERIOD=5', 'EVAL_PERIOD=5', 'EVAL_STEPS=2', 'DATA_SEED=0', 'optimizer.warmup_steps=1',
              'LEARNING_RATE=0.01']
  one = [*common, "MIXTURE_OR_TASK_NAME='books'", f"CHECKPOINT_PATH='{out}/stage2/checkpoint_3'"]
  t5x_run('train', 'stage1', *training, 'TRAIN_STEPS=5', f"MODEL_DIR='{out}/stage1'")
  t5x_run('train', 'stage2', *training, 'TRAIN_STEPS=3', f"MODEL_DIR='{out}/stage2'", "MIXTURE_OR_TASK_NAME='books'",
          f"INITIAL_CHECKPOINT_PATH='{out}/stage1/checkpoint_5'")
  for mode in ('predict', 'score'):
    t5x_run('infer', 'infer', *one, f"INFER_OUTPUT_DIR='{out}/infer'", f"MODE='{mode}'",
            't5x_model.CALRecModel.max_new_tokens=6')
  t5x_run('eval', 'eval', *one, f"EVAL_OUTPUT_DIR='{out}/eval'", 'EVAL_STEPS=2', 't5x_model.CALRecModel.max_new_tokens=6')
  return out


def logged(folder: pathlib.Path) -> dict[tuple[str, int], float]:
  """(name, step) to value of the terms in T5X's events, beside which there is text."""
  names = ('loss', 'nig', 'tt', 'ut', 'learning_rate')
  return {key: value for name in names for key, value in tiny.scalars(folder, name).items()}


@pytest.mark.slow
def test_t5x_trains_both_stages(chain):
  losses = {stage: logged(chain / f'{stage}/train') for stage in ('stage1', 'stage2')}
  assert {'loss', 'nig', 'tt', 'ut', 'learning_rate/current'} <= {name for name, _ in losses['stage1']}
  assert losses['stage2']['loss', 3] < losses['stage1']['loss', 5]
  assert losses['stage2']['nig', 3] < losses['stage1']['nig', 5] and losses['stage2']['tt', 3] > 0
  judged = logged(chain / 'stage2/training_eval/books')
  assert 0 < judged['loss', 3] < losses['stage1']['loss', 5]
  assert sorted(path.name for path in (chain / 'stage2').glob('checkpoint_*')) == ['checkpoint_0', 'checkpoint_3']


@pytest.mark.slow
def test_t5x_infers_for_every_user(chain):
  rows = {mode: [json.loads(line) for line in (chain / f'infer/books-{mode}.jsonl-00000-of-00001').read_text().splitlines()]
          for mode in ('predict', 'score')}
  assert len(rows['predict']) == len(rows['score']) == 40
  assert all(row['inputs']['inputs_pretokenized'].startswith('This is the summary') for row in rows['predict'])
  assert all(isinstance(row['prediction'], str) for row in rows['predict']) and all(row['score'] < 0 for row in rows['score'])


@pytest.mark.slow
def test_t5x_evaluates_the_task_and_the_losses(chain):
  scores = [json.loads(line)['score'] for line in (chain / 'infer/books-score.jsonl-00000-of-00001').read_text().splitlines()]
  metrics = json.loads(next((chain / 'eval').rglob('books-metrics.jsonl')).read_text().splitlines()[-1])
  np.testing.assert_allclose(metrics['log_likelihood'], np.mean(scores), rtol=1e-5)
  assert 0 <= metrics['exact_match'] <= 1
  losses = logged(chain / 'eval/training_eval/books')
  assert {'loss', 'nig', 'tt', 'ut'} <= {name for name, _ in losses} and losses['loss', 3] > 0


@pytest.mark.slow
def test_what_t5x_trained_is_imported_bit_for_bit(chain, model, batch, tmp_path):
  assert cli.main(['import', '--from', str(chain / 'stage2'), '--out', str(tmp_path / 'out')]) == 0
  loaded = load(tmp_path / 'out')
  check_same(model, batch, {'decoder': loaded.params}, restored(model, batch, chain / 'stage2/checkpoint_3'))
  assert loaded.lengths == LENGTHS
