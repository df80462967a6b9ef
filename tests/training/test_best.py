"""The best step of a run: which it is, that it is kept, that training ends by it, and that a killed run agrees."""

import shutil

import pytest
import tiny

from calrec_jax.errors import UserError
from calrec_jax.evaluation.dense import dense_metrics
from calrec_jax.training import checkpoints
from calrec_jax.training.best import Best
from calrec_jax.training.trainer import Schedule


@pytest.mark.parametrize('metric, values, steps, waited', [
    ('ndcg@10', [0.1, 0.3, 0.3, 0.2], [1, 2, 2, 2], [0, 0, 1, 2]), ('recall@10', [0.0, 0.0, 0.1], [1, 1, 3], [0, 1, 0]),
    ('loss', [3.0, 4.0, 2.0, 2.0], [1, 1, 3, 3], [0, 1, 0, 1]), ('nig', [1.0, 0.5], [1, 2], [0, 0])])
def test_the_best_of_a_row_of_evaluations(metric, values, steps, waited):
  best, found = Best(metric), []
  for step, value in enumerate(values, 1):
    best = best.after(step, {metric: value, 'other': -step})
    found.append((best.step, best.waited))
  assert found == list(zip(steps, waited, strict=True))
  assert best.after(9, {'other': 1.0}) == best  # it was not judged by this metric
  assert Best(**best.to_json()) == best


def judged_by(values):
  """A judge that gives these values in turn."""
  values = iter(values)
  return lambda embedded: {'ndcg@10': next(values), 'recall@10': 0.0}


def steps_of(model_dir) -> list[int]:
  return sorted(int(path.name) for path in (model_dir / 'checkpoints').iterdir())


def test_the_best_step_is_kept_beside_the_newest(tiny_store, tmp_path):
  schedule = Schedule(log_every=1, eval_every=1, save_every=2, keep=2)
  tiny.train(tiny_store, tmp_path / 'run', schedule=schedule, judge=judged_by([0.1, 0.5, 0.2, 0.2, 0.2, 0.5]))
  assert steps_of(tmp_path / 'run') == [2, 4, 6]
  assert checkpoints.find(tmp_path / 'run').step == 6
  best = checkpoints.find(tmp_path / 'run' / 'best')
  assert best.step == 2 and best.description['validation']['ndcg@10'] == 0.5
  # A next stage, or any other verb, takes it by that name.
  tiny.train(tiny_store, tmp_path / 'stage2', train_steps=1, initial_checkpoint=str(tmp_path / 'run' / 'best'))


def test_without_a_best_step_its_name_is_refused(tiny_store, tmp_path):
  tiny.train(tiny_store, tmp_path / 'run', train_steps=1)
  with pytest.raises(UserError, match='no best step'):
    checkpoints.find(tmp_path / 'run' / 'best')
  with pytest.raises(UserError, match='holds no checkpoint'):
    checkpoints.find(tmp_path / 'nothing' / 'best')


def test_training_ends_early_also_when_it_was_killed_while_it_waited(tiny_store, tmp_path):
  class Killed(BaseException):
    pass
  def judge(values):
    values = iter(values)
    def call(embedded):
      if (value := next(values)) is None:
        raise Killed
      return {'ndcg@10': value}
    return call
  schedule = Schedule(log_every=1, eval_every=1, save_every=1, keep=1, patience=2)
  run = lambda folder, values: tiny.train(tiny_store, tmp_path / folder, schedule=schedule, judge=judge(values))
  assert run('whole', [0.4, 0.1, 0.2])['ndcg@10'] == 0.2
  assert steps_of(tmp_path / 'whole') == [1, 3]
  with pytest.raises(Killed):
    run('killed', [0.4, 0.1, None])
  assert run('killed', [0.2])['ndcg@10'] == 0.2  # the third evaluation, and the second in vain
  assert steps_of(tmp_path / 'killed') == [1, 3]
  before = sorted((tmp_path / 'killed' / 'checkpoints').rglob('*'))
  assert run('killed', []) == {}  # nothing is left to do
  assert sorted((tmp_path / 'killed' / 'checkpoints').rglob('*')) == before


def test_a_run_is_judged_by_dense_retrieval(tiny_store, tmp_path):
  found = tiny.train(tiny_store, tmp_path / 'run', judge=dense_metrics)
  assert 0 < found['ndcg@10'] <= found['recall@10'] <= 1 and found['loss'] > 0
  logged = tiny.scalars(tmp_path / 'run', 'validation/')
  assert logged['validation/ndcg@10', 6] == pytest.approx(found['ndcg@10'])
  assert checkpoints.find(tmp_path / 'run').description['best'] == {
      'metric': 'ndcg@10', 'step': 6, 'value': found['ndcg@10'], 'waited': 0}


def test_the_best_one_survives_a_copy_of_the_folder(tiny_store, tmp_path):
  tiny.train(tiny_store, tmp_path / 'run', judge=dense_metrics, train_steps=2)
  shutil.move(tmp_path / 'run', tmp_path / 'moved')
  assert checkpoints.find(tmp_path / 'moved' / 'best').step == 2


@pytest.mark.parametrize('options, message', [
    ({'best_metric': 'mrr'}, "schedule.best_metric = 'mrr': choose one of recall@10, ndcg@10, recall@10_unseen, "
                             'ndcg@10_unseen, loss, nig, tt, ut'),
    ({'patience': 2, 'eval_every': 0}, 'schedule.patience = 2: needs evaluations'),
    ({'patience': 0}, 'schedule.patience = 0: give at least 1'), ({'log_every': 0}, 'schedule.log_every = 0'),
    ({'keep': 0}, 'schedule.keep = 0'), ({'save_every': -1}, 'schedule.save_every = -1')])
def test_a_schedule_that_cannot_be(options, message):
  with pytest.raises(UserError, match=message):
    Schedule(**options)
