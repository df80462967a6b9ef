"""Generated texts of other users: by their ids, their data, their split, their copies, and by the checkpoint itself."""

import json

import numpy as np
import pytest
from audit_shop import read_lines, store, write_lines

from calrec_jax.data.histories import load as load_histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.audit import baselines, exact, generations, training
from calrec_jax.evaluation.audit.audit import audit
from calrec_jax.evaluation.audit.findings import SERIOUS
from calrec_jax.evaluation.generations import NAME


def one(result: dict) -> dict:
  assert result['serious'] == len(result['findings']) == 1, result
  return result['findings'][0]


def rewrite(folder, change, name: str = NAME) -> list[dict]:
  rows = read_lines(folder / name)
  write_lines(folder / name, change(rows) or rows)
  return rows


def record(folder, **changes) -> None:
  path = folder / 'run.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_clean_run_has_no_finding_and_leads_to_all_its_folders(whole_chain):
  result = audit(whole_chain.data, [whole_chain.evaluate, whole_chain.index], checkpoint=str(whole_chain.checkpoint))
  assert result['findings'] == [] and result['serious'] == result['notes'] == 0
  assert result['audited'] == [str(getattr(whole_chain, name)) for name in ('evaluate', 'index', 'infer', 'checkpoint')]


def test_unknown_users_and_users_with_two_lines_are_serious(chain):
  def change(rows):
    rows[3]['user_id'] = 'nobody\x1b[2J'
    return [*rows, rows[0]]

  rows = rewrite(chain.infer, change)
  unknown, twice = audit(chain.data, [chain.infer])['findings']
  assert all((each['check'], each['severity'], each['count']) == (generations.USERS, SERIOUS, 1) for each in (unknown, twice))
  assert unknown['examples'] == ['user nobody�[2J'] and twice['examples'] == [f'user {rows[0]["user_id"]}']


def test_equal_lists_of_users_with_different_histories_are_serious(chain):
  data = load_histories(chain.data)
  numbers = {user_id: user for user, user_id in enumerate(data.user_ids)}
  newest = lambda row: data.seen(numbers[row['user_id']], 'test')[-2]
  pair = {}

  def copy(rows):
    rows[0] |= {'texts': ['a', 'b', 'c', 'd'], 'logprobs': [-1.5, -2.5, -3.5, -4.5], 'finished': [True] * 4}
    pair['other'] = next(row for row in rows if newest(row) != newest(rows[0]))
    pair['other'] |= {name: rows[0][name] for name in ('texts', 'logprobs', 'finished')}

  rows = rewrite(chain.infer, copy)
  found = one(audit(chain.data, [chain.infer]))
  assert (found['check'], found['count']) == (generations.COPIES, 2)
  assert rows[0]['user_id'] in found['examples'][0] and pair['other']['user_id'] in found['examples'][0]
  pair['other']['logprobs'] = [-1.5, -2.5, -3.5, -4.6]
  write_lines(chain.infer / NAME, rows)
  assert audit(chain.data, [chain.infer])['findings'] == []


def test_equal_candidates_are_serious_too(chain):
  data = load_histories(chain.data)
  rows = [{'user_id': user_id, 'item_ids': data.item_ids[:5], 'scores': [0.9, 0.7, 0.5, 0.4, 0.1]} for user_id in data.user_ids]
  write_lines(chain.infer / 'candidates-dense.jsonl.gz', rows)
  found = one(audit(chain.data, [chain.infer]))
  assert (found['check'], found['count']) == (generations.COPIES, 30) and 'candidates-dense' in found['message']
  write_lines(chain.infer / 'candidates-dense.jsonl.gz', [row | {'scores': [0.5] * 5} for row in rows])  # nothing but ties
  assert audit(chain.data, [chain.infer])['findings'] == []


def test_generations_of_another_data_set_or_split_are_serious(chain):
  report = json.loads((chain.infer / 'run.json').read_text())['report']
  record(chain.infer, report=report | {'split': 'validation'})
  found = one(audit(chain.data, [chain.evaluate]))
  assert found['check'] == generations.MADE_FOR and 'judges the test split' in found['message']
  record(chain.infer, report=report, data={'games': '0' * 64})
  both = audit(chain.data, [chain.evaluate])['findings']
  assert [each['check'] for each in both] == [generations.MADE_FOR] * 2 and 'another data set' in both[0]['message']


def test_runs_on_another_data_set_are_serious(chain, clean, tmp_path):
  result = audit(store(clean, tmp_path / 'shop'), [chain.evaluate])
  assert [each['check'] for each in result['findings'][:2]] == [baselines.OTHER_DATA, generations.MADE_FOR]
  assert result['serious'] == 2 and {each['check'] for each in result['findings'][2:]} == {training.UNCHECKED}


def test_swapped_users_are_found_by_the_checkpoint_alone(chain):
  def rotate(rows):
    ids = [row['user_id'] for row in rows]
    return [row | {'user_id': user_id} for row, user_id in zip(rows, ids[3:] + ids[:3], strict=True)]

  rewrite(chain.infer, rotate)
  assert audit(chain.data, [chain.infer])['findings'] == []
  found = one(audit(chain.data, [chain.infer], checkpoint=str(chain.checkpoint)))
  assert (found['check'], found['count']) == (exact.CHECK, exact.USERS) and 'nats a token off' in found['examples'][0]


def test_one_user_with_anothers_texts_is_found_where_the_others_agree(chain, monkeypatch):
  """Which texts agree is given here: a model that writes its tokens as the vocabulary cuts them, and one that does not."""
  agree = lambda count, texts: [0.0] * count + [1.0] * (texts - count)
  for others, told in (((7, 8), 1), ((1, 8), 0)):
    errors = [np.array(agree(0, 8)), *[np.array(agree(*others))] * 7]
    monkeypatch.setattr(exact, '_differences', lambda *_, errors=errors: errors)
    result = audit(chain.data, [chain.infer], checkpoint=str(chain.checkpoint))
    assert result['serious'] == told and [each['count'] for each in result['findings']] == [1] * told


def test_another_checkpoint_or_no_generations_are_wrong_input(chain, tmp_path):
  with pytest.raises(UserError, match='of step 36, and .*12 has 12'):
    audit(chain.data, [chain.infer], checkpoint=str(chain.checkpoint / 'checkpoints/12'))
  with pytest.raises(UserError, match='no generations to score'):
    audit(chain.data, [chain.index], checkpoint=str(chain.checkpoint))
  rewrite(chain.infer, lambda rows: [row | {'finished': [False] * len(row['texts'])} for row in rows])
  with pytest.raises(UserError, match='none of its texts is finished'):
    audit(chain.data, [chain.infer], checkpoint=str(chain.checkpoint))


@pytest.mark.parametrize('line', ['{"user_id"', '[]', '{"user_id": 3, "texts": [], "logprobs": []}',
                                  '{"user_id": "a", "texts": ["x"], "logprobs": []}', '{"user_id": "a"}'])
def test_broken_lines_are_told(chain, line):
  rewrite(chain.infer, lambda rows: [rows[0], line])
  with pytest.raises(UserError, match=f'{NAME}: line 2: '):
    audit(chain.data, [chain.infer])
