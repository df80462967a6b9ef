"""Held-out events in the data that a model was trained on: planted in another data set, found by what runs name."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from audit_shop import DAY, changed, split_rows, store, with_rows

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.audit import training, users
from calrec_jax.evaluation.audit.audit import audit
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS


def longer(data: Histories, n_users: int, n_more: int = 2) -> Histories:
  """Another preparation of the same shop, in which some users go on, so that what was held out is in their train parts."""
  def go_on(rows, times):
    for user in range(n_users):
      rows[user] = np.append(rows[user], np.setdiff1d(np.arange(len(data.item_ids)), rows[user])[:n_more])
      times[user] = np.append(times[user], times[user][-1] + DAY * np.arange(1, n_more + 1))

  return changed(data, go_on, name='longer')


def a_run(folder: pathlib.Path, data: dict[str, str], **bindings: str) -> pathlib.Path:
  """What of a training run is read: its record, and that it has a checkpoint."""
  (folder / 'checkpoints/4').mkdir(parents=True)
  (folder / 'run.json').write_text(json.dumps({'data': data}))
  lines = [f"{name.upper()} = \\\n    '{value}'\n{binding} = %{name.upper()}\n" for name, binding, value in (
      (name, {'data_dir': 'inputs.data_dir', 'initial': 'train.initial_checkpoint'}[name], value)
      for name, value in bindings.items())]
  (folder / 'config.gin').write_text('# Macros:\n' + ''.join(lines))
  return folder


def test_the_train_split_of_the_data_itself_shows_no_target(clean, tmp_path):
  run = a_run(tmp_path / 'run', {'shop': clean.fingerprint})
  assert audit(store(clean, tmp_path / 'shop'), [run])['findings'] == []
  np.testing.assert_array_equal(training.shown_in_training(clean), clean.visible('train'))


@pytest.mark.parametrize('timed', [True, False])
def test_targets_that_another_data_set_trains_on_are_serious(clean, tmp_path, timed):
  other = longer(clean, 7)
  if not timed:
    other = with_rows(other, split_rows(other)[0], None, name='longer')
  result = audit(store(clean, tmp_path / 'shop'), [store(other, tmp_path / 'longer')])
  test, validation = (each for each in result['findings'] if each['check'] == training.CHECK)
  assert test['severity'] == validation['severity'] == SERIOUS and test['count'] == validation['count'] == 7
  assert '7 of 120 test targets' in test['message'] and 'validation targets' in validation['message']
  assert clean.user_ids[0] in test['examples'][0] and clean.item_ids[clean.history(0)[-1]] in test['examples'][0]
  [shared] = (each for each in result['findings'] if each['check'] == users.SHARED)
  assert (shared['severity'], shared['count']) == (NOTE, 7)


def test_one_event_more_leaks_the_validation_target_alone(clean):
  [one] = training.check_training(clean, training.TrainedOn(longer(clean, 5, n_more=1), 'a test'))
  assert one.count == 5 and 'validation targets' in one.message


def test_other_times_and_other_users_are_no_leak(clean):
  other = longer(clean, 7)
  for harmless in (dataclasses.replace(other, timestamps=other.timestamps + 5),
                   dataclasses.replace(other, user_ids=[f'other {user_id}' for user_id in other.user_ids]),
                   dataclasses.replace(other, item_ids=[f'other {item_id}' for item_id in other.item_ids])):
    assert list(training.check_training(clean, training.TrainedOn(harmless, 'a test'))) == []


def test_an_item_that_the_own_train_part_holds_is_no_leak(clean):
  def repeat(rows, times):
    for row in rows:
      row[-1] = row[0]

  again = changed(clean, repeat)
  assert all('validation' in each.message for each in training.check_training(again, training.TrainedOn(longer(again, 7), 'x')))


def test_a_train_split_that_shows_too_much_is_found(clean, monkeypatch):
  monkeypatch.setattr(training, 'shown_in_training', lambda data: data.visible('test'))
  both = list(training.check_training(clean, training.TrainedOn(clean, 'a test')))
  assert [each.count for each in both] == [120, 120] and 'examples of itself' in both[0].message


def test_data_is_found_in_the_runs_data_dir_and_beside_the_data_set(clean, tmp_path):
  other = longer(clean, 3)
  data, there = store(clean, tmp_path / 'data/shop'), store(other, tmp_path / 'elsewhere/longer')
  run = a_run(tmp_path / 'run', {'longer': other.fingerprint}, data_dir=str(there.parent))
  assert audit(data, [run])['serious'] == 2
  there.rename(data.parent / 'longer')
  assert audit(data, [run])['serious'] == 2
  (data.parent / 'longer').rename(tmp_path / 'moved')
  [note] = audit(data, [run])['findings']
  assert (note['check'], note['severity']) == (training.UNCHECKED, NOTE) and 'longer' in note['message']
  assert audit(data, [run, tmp_path / 'moved'])['serious'] == 2


def test_stage_one_is_audited_with_stage_two(clean, tmp_path):
  other = longer(clean, 3)
  data = store(clean, tmp_path / 'data/shop')
  store(other, tmp_path / 'data/longer')
  first = a_run(tmp_path / 'runs/stage1', {'longer': other.fingerprint})
  second = a_run(tmp_path / 'runs/stage2', {'shop': clean.fingerprint}, initial=str(first / 'checkpoints/4'))
  result = audit(data, [second])
  assert result['serious'] == 2 and result['audited'] == [str(second), str(first)]
  assert str(first) in result['findings'][0]['message']
  first.rename(tmp_path / 'gone')
  [note] = audit(data, [second])['findings']
  assert note['check'] == training.UNCHECKED and 'began with' in note['message']


def test_users_of_another_category_are_as_they_should_be(clean):
  elsewhere = dataclasses.replace(longer(clean, 7), item_ids=[f'book {item_id}' for item_id in clean.item_ids])
  assert list(users.check_shared_users(clean, elsewhere, 'a test')) == []
