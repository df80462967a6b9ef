"""What a training run measures, and what it leaves in its folder."""

import dataclasses
import json
import pathlib
import shutil
import time

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from calrec_jax.errors import UserError
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.flops import training_flops
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.batches import BatchPlan, OnePass, RowOptions
from calrec_jax.text.rows import Shapes
from calrec_jax.training import checkpoints, partitioning, trainer
from calrec_jax.training.meter import CHECKED, Meter, progress_line
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import init_params
from calrec_jax.training.trainer import with_vocabulary
from calrec_jax.training.validation import Validation, mean_losses

STEPS = 6


@pytest.fixture(scope='module')
def finished(tiny_store, tmp_path_factory) -> pathlib.Path:
  model_dir = tmp_path_factory.mktemp('finished') / 'run'
  tiny.train(tiny_store, model_dir, train_steps=STEPS)
  return model_dir


def test_the_run_folder_tells_what_the_run_was(tiny_store, finished):
  folder = finished
  names = {path.name for path in folder.iterdir()}
  assert {'config.gin', 'run.json', 'vocabulary.json', 'checkpoints'} <= names
  facts = json.loads((folder / 'run.json').read_text())
  data = {source.histories.name: source.histories.fingerprint for source in tiny.inputs(tiny_store).load()}
  assert facts['seed'] == 0 and facts['data'] == data and set(data) == set(tiny.NAMES)
  assert {'calrec_jax', 'jax', 'flax', 'optax', 'numpy', 'python'} <= facts['versions'].keys()
  assert facts['mesh'] == {'data': 8, 'fsdp': 1, 'model': 1}
  description = checkpoints.find(folder).description
  assert description['data'] == data and description['decoder']['n_layers'] == 2
  assert description['vocabulary'] == tiny.inputs(tiny_store).vocabulary.fingerprint
  assert (folder / 'vocabulary.json').read_text() == (tiny_store / 'vocabulary.json').read_text()


def test_tensorboard_has_every_term(finished):
  found = tiny.scalars(finished)
  for term in ('loss', 'nig', 'tt', 'ut', 'spans', 'target_tokens', 'tokens', 'gradient_norm', 'tt_accuracy',
               'ut_accuracy', 'learning_rate', 'padding', 'spans_per_second', 'tokens_per_second', 'steps_per_second'):
    assert sorted(step for name, step in found if name == f'train/{term}') == list(range(1, STEPS + 1)), term
  for split, step in [('train', 3), ('validation', STEPS)]:
    loss, nig, tt, ut = (found[f'{split}/{term}', step] for term in ('loss', 'nig', 'tt', 'ut'))
    assert loss == pytest.approx(tiny.OBJECTIVE.total(nig, tt, ut), rel=1e-5)
  assert found['train/loss', STEPS] < found['train/loss', 1]


def test_validation_means_are_weighted_by_what_they_are_means_over():
  rows = [{'nig': 2.0, 'tt': 1.0, 'ut': 3.0, 'target_tokens': 10.0, 'spans': 1.0, 'loss': 99.0, 'tokens': 1.0},
          {'nig': 5.0, 'tt': 2.0, 'ut': 6.0, 'target_tokens': 20.0, 'spans': 3.0, 'loss': 99.0, 'tokens': 1.0}]
  objective = Objective(alpha=0.25, beta=0.5)
  means = mean_losses(rows, objective)
  assert means == pytest.approx({'nig': 4.0, 'tt': 1.75, 'ut': 5.25, 'loss': 0.25 * 4 + 0.25 * 1.75 + 0.5 * 5.25})


def test_validation_of_many_batches_is_that_of_one(tiny_store):
  inputs, mesh = tiny.inputs(tiny_store), MeshShape().build()
  model = TwoTower(Decoder(with_vocabulary(tiny.DECODER, inputs)), Objective(alpha=0.0, beta=0.0))
  corpus, rows, found = inputs.corpus(inputs.load(), 'validation'), RowOptions(targets='last'), []
  for batch_size in (8, 80):
    batches = OnePass(corpus, batch_size=batch_size, length=inputs.length, options=rows)
    params = init_params(model, jax.random.key(0), batches.shapes)
    validation = Validation(batches, model, mesh, partitioning.shardings(params, mesh))
    found.append((len(batches), validation(nn.unbox(params))))
  (many, means), (one, whole) = found
  assert many > 1 == one
  assert means == pytest.approx(whole, rel=1e-5)


def test_meter_means_and_rates(monkeypatch):
  clock = iter([10.0, 14.0, 14.0])
  monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
  plan = type('Plan', (), {'shapes': Shapes(B=2, L=30, M=20, E=0, S=0)})
  meter = Meter(plan, tiny.DECODER, jax.devices()[:1])
  for step, (spans, loss) in enumerate([(2, 1.0), (4, 2.0)]):
    meter.add(step, {'spans': np.int32(spans), 'tokens': np.int32(10 * spans), 'loss': np.float32(loss)})
  assert meter.read() == {'spans': 3.0, 'tokens': 30.0, 'loss': 1.5, 'spans_per_second': 1.5,
                          'tokens_per_second': 15.0, 'steps_per_second': 0.5, 'padding': 0.7}


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('term', CHECKED)
def test_a_number_that_is_none_names_its_step_and_examples(term, value):
  class Plan:
    def example_ids(self, step):
      return [f'user{step}-{i}' for i in range(10)]
  meter = Meter(Plan(), tiny.DECODER, jax.devices())
  good = dict.fromkeys(CHECKED, np.float32(1))
  meter.add(6, good)
  meter.check()
  meter.add(7, good | {term: np.float32(value)})
  meter.add(8, good | {'ut': np.float32(np.nan)})
  with pytest.raises(UserError, match=rf'Step 8: {term} = {value}. Its examples: user7-0, .*user7-7 and 2 more') as error:
    meter.check()
  assert '\n' not in str(error.value)


def test_a_loss_that_is_none_stops_the_run_and_keeps_the_checkpoint_before(tiny_store, tmp_path, monkeypatch):
  prefetched = trainer._prefetched
  def poisoned(plan, mesh, start, stop):
    for step, batch in prefetched(plan, mesh, start, stop):
      yield step, batch | ({'loss_weights': batch['loss_weights'] * np.nan} if step == 3 else {})
  with monkeypatch.context() as patch:
    patch.setattr(trainer, '_prefetched', poisoned)
    for log_every, eval_every in [(1, 0), (100, 0), (100, 4)]:  # also where the step is looked at for the first time
      folder = tmp_path / f'run{log_every}-{eval_every}'
      with pytest.raises(UserError, match='Step 4: nig = nan'):
        tiny.train(tiny_store, folder, schedule=trainer.Schedule(log_every=log_every, eval_every=eval_every, save_every=2))
      assert checkpoints.newest_step(folder) == 2
  assert tiny.train(tiny_store, folder)['loss'] > 0  # the same command goes on


@pytest.mark.parametrize('changes, named', [
    ({'train_steps': 8}, 'train_steps is 6 there, 8 here'),
    ({'optimizer': trainer.Optimizer(warmup_steps=2, learning_rate=0.5)}, 'optimizer.learning_rate is 0.001 there, 0.5 here'),
    ({'rows': RowOptions(window_steps=4, targets='last')}, 'rows.targets is all there, last here'),
    ({'objective': Objective(alpha=0.3, beta=0.2, temperature=0.1)}, 'objective.temperature is 0.5 there, 0.1 here'),
    ({'seed': 1}, 'seed is 0 there, 1 here'), ({'batch_size': 16}, 'batch_size is 8 there, 16 here')])
def test_another_setting_in_one_folder_is_refused(tiny_store, finished, changes, named):
  before = sorted((finished / 'checkpoints').iterdir())
  with pytest.raises(UserError, match=named) as error:
    tiny.train(tiny_store, finished, **changes)
  assert 'allow_changes' in str(error.value)
  assert sorted((finished / 'checkpoints').iterdir()) == before


def test_a_head_without_positions_is_refused(tiny_store, tmp_path):
  with pytest.raises(UserError, match='train.head_block = 0: give at least 1'):
    tiny.train(tiny_store, tmp_path / 'run', head_block=0)
  assert not (tmp_path / 'run').exists()


def test_other_rates_of_a_mixture_are_refused(tiny_store, finished):
  with pytest.raises(UserError, match="begun with other rates .*'games': 0.478.* there, .*'games': 0.428.* here"):
    tiny.train(tiny_store, finished, inputs=tiny.inputs(tiny_store, exponent=1.0))


def test_another_setting_is_taken_where_it_is_allowed(tiny_store, finished, tmp_path):
  copy = shutil.copytree(finished, tmp_path / 'run')
  tiny.train(tiny_store, copy, train_steps=STEPS + 2, allow_changes=True)
  assert checkpoints.newest_step(copy) == STEPS + 2


def test_the_embedding_has_a_row_for_each_token_and_divides(tiny_store):
  inputs = tiny.inputs(tiny_store)
  assert inputs.vocabulary.vocab_size <= with_vocabulary(tiny.DECODER, inputs).vocab_size == 384
  assert with_vocabulary(dataclasses.replace(tiny.DECODER, vocab_size=1000), inputs).vocab_size == 1000
  with pytest.raises(UserError, match='vocab_size = 100'):
    with_vocabulary(dataclasses.replace(tiny.DECODER, vocab_size=100), inputs)


@pytest.mark.parametrize('make, message', [
    (lambda path: path.write_text('x'), 'is a file'),
    (lambda path: (path.mkdir(), (path / 'thesis.tex').write_text('x')), 'in use')])
def test_a_foreign_folder_is_refused_and_left_alone(tiny_store, tmp_path, make, message):
  make(tmp_path / 'out')
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(UserError, match=message):
    tiny.train(tiny_store, tmp_path / 'out')
  assert sorted(tmp_path.rglob('*')) == before


def test_a_place_that_cannot_be_written(tiny_store, tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='cannot be written|is a file'):
    tiny.train(tiny_store, tmp_path / 'file' / 'run')


def test_rows_that_do_not_divide_are_told_before_anything_is_written(tiny_store, tmp_path):
  with pytest.raises(UserError, match='BATCH_SIZE = 12'):
    tiny.train(tiny_store, tmp_path / 'run', batch_size=12)
  with pytest.raises(UserError, match='8 devices'):
    tiny.train(tiny_store, tmp_path / 'run', mesh=MeshShape(3))
  with pytest.raises(UserError, match='2 microbatches over 8'):
    tiny.train(tiny_store, tmp_path / 'run', microbatches=2)
  assert list(tmp_path.iterdir()) == []


def test_a_line_of_progress_tells_what_is_left():
  values = {'loss': 2.5, 'nig': 2.0, 'tt': 3.0, 'ut': 4.0, 'spans_per_second': 12.4, 'tokens_per_second': 345.6,
            'padding': 0.041, 'steps_per_second': 0.1}
  assert progress_line(values, 400) == (
      'loss 2.500 nig 2.000 tt 3.000 ut 4.000, 12 spans/s, 346 tokens/s, padding 4%, 1:06:40 left')
  assert ', MFU 46%, ' in progress_line(values | {'mfu': 0.4551}, 400)


def test_progress_is_written_where_there_is_no_terminal(tiny_store, tmp_path, caplog):
  with caplog.at_level('INFO'):
    tiny.train(tiny_store, tmp_path / 'run', schedule=trainer.Schedule(log_every=3, eval_every=0))
  lines = [record.getMessage() for record in caplog.records if 'spans/s' in record.getMessage()]
  assert [line.split(':')[0] for line in lines] == ['step 3 of 6', 'step 6 of 6']
  assert lines[-1].endswith('0:00:00 left')


def test_mfu_is_told_where_the_peak_is_known(tiny_store):
  class Device:
    device_kind = 'TPU v5 lite'
  inputs = tiny.inputs(tiny_store)
  decoder = with_vocabulary(tiny.DECODER, inputs)
  plan = BatchPlan(inputs.corpus(inputs.load(), 'train'), batch_size=8, length=64, seed=0, options=RowOptions(window_steps=4))
  meter, batch = Meter(plan, decoder, [Device(), Device()]), plan.batch(0)
  meter.add(0, {'spans': np.int32(1), 'tokens': np.int32((batch['segments'] > 0).sum() + (batch['alone_segments'] > 0).sum())})
  lengths, targets = plan.lengths(0)
  assert targets == batch['loss_weights'].sum() and lengths.sum() == meter._metrics[0]['tokens']
  values = meter.read()
  assert values['mfu'] == pytest.approx(training_flops(decoder, lengths, targets) * values['steps_per_second'] / (2 * 197e12))
  assert 0 < values['padding'] < 0.5


def test_a_trace_is_written_on_request(tiny_store, tmp_path):
  tiny.train(tiny_store, tmp_path / 'run', schedule=trainer.Schedule(eval_every=0, profile_steps=2))
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
  tiny.train(tiny_store, tmp_path / 'short', train_steps=2, schedule=trainer.Schedule(eval_every=0, profile_steps=9))
  assert list((tmp_path / 'short' / 'profile').rglob('*.xplane.pb'))  # the run ended first
