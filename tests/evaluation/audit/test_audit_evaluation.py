"""Evaluations and indexes: baselines that know too much, other data, other catalogues."""

import json
import pathlib

import numpy as np
import pytest
from audit_shop import read_lines, shop, store, write_lines

from calrec_jax import runs
from calrec_jax.data import json_lines
from calrec_jax.data.histories import load
from calrec_jax.errors import UserError
from calrec_jax.evaluation.audit import baselines, catalogue
from calrec_jax.evaluation.audit.audit import audit
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.text.templates import ItemTemplate


@pytest.fixture
def evaluated(clean, tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
  """(the clean data set, an evaluation of its baselines)."""
  data = store(clean, tmp_path / 'data/shop')
  runs.rank(data_dir=str(tmp_path / 'data'), task_name='shop', template=ItemTemplate(), out=str(tmp_path / 'evaluate'))
  return data, tmp_path / 'evaluate'


def counted_anew(data, folder: pathlib.Path, until: int) -> None:
  """Ranks by popularity with the last `until` events of each history left out, and writes the places into the file."""
  counts_I = np.zeros(len(data.item_ids), int)
  for user in range(len(data.user_ids)):
    np.add.at(counts_I, data.history(user)[:len(data.history(user)) - until], 1)
  path, number_of = folder / 'rankings-popularity.jsonl.gz', {each: number for number, each in enumerate(data.item_ids)}
  rows = read_lines(path)
  for row in rows:
    own = counts_I[number_of[row['target']]]
    row |= {'better': int((counts_I > own).sum()), 'tied': int((counts_I == own).sum()) - 1}
  write_lines(path, rows)


def test_a_clean_evaluation_has_no_finding(clean, evaluated):
  assert audit(evaluated[0], [evaluated[1]])['findings'] == []
  counted_anew(clean, evaluated[1], 2)  # the test counts as the baseline does
  assert audit(evaluated[0], [evaluated[1]])['findings'] == []


@pytest.mark.parametrize(('until', 'told'), [(0, 'fits counts over all events'), (1, 'hold the validation targets too'),
                                             (3, 'made from other data')])
def test_popularity_of_other_events_than_the_train_parts_is_serious(clean, evaluated, until, told):
  counted_anew(clean, evaluated[1], until)
  [one] = audit(evaluated[0], [evaluated[1]])['findings']
  assert (one['check'], one['severity']) == (baselines.CHECK, SERIOUS) and 1 < one['count'] <= 120
  assert told in one['message'] and 'rankings-popularity' in one['message'] and len(one['examples']) == 3


def test_transitions_with_the_test_event_are_serious(clean, evaluated):
  """The file is made by the baseline itself, with train parts that hold everything."""
  whole = baselines._Counting(clean.name, clean.user_ids, clean.item_ids, clean.items, clean.offsets, clean.events,
                              counted='test')
  scorer = baselines.transitions.scorer(whole, 'test')
  path = evaluated[1] / 'rankings-transitions.jsonl.gz'
  rows = [row | dict(zip(('better', 'tied'), baselines.place(scorer(user), int(clean.history(user)[-1])), strict=True))
          for user, row in enumerate(read_lines(path))]
  write_lines(path, rows)
  [one] = audit(evaluated[0], [evaluated[1]])['findings']
  assert one['check'] == baselines.CHECK and 'over all events' in one['message'] and 'rankings-transitions' in one['message']


def test_an_evaluation_of_another_data_set_is_serious(evaluated, tmp_path):
  [one] = audit(store(shop(seed=1), tmp_path / 'other'), [evaluated[1]])['findings']
  assert (one['check'], one['severity']) == (baselines.OTHER_DATA, SERIOUS)


def test_other_targets_are_serious(clean, evaluated):
  path = evaluated[1] / 'rankings-popularity.jsonl.gz'
  rows = read_lines(path)
  rows[3]['target'] = clean.item_ids[clean.history(3)[0]]
  write_lines(path, rows)
  [one] = audit(evaluated[0], [evaluated[1]])['findings']
  assert (one['check'], one['count']) == (baselines.OTHER_DATA, 1) and clean.user_ids[3] in one['examples'][0]


@pytest.mark.parametrize(('split', 'seen_items', 'protocol'), [('validation', 'kept', 'leave_one_out_full'),
                                                               ('test', 'filtered', 'leave_one_out_sampled')])
def test_other_protocols_are_counted_by_their_own_rules(clean, tmp_path, split, seen_items, protocol):
  data = store(clean, tmp_path / 'shop')
  evaluate(histories=load(data), template=ItemTemplate(), out=tmp_path / 'out', split=split, seen_items=seen_items,
           protocol=protocol)
  assert audit(data, [tmp_path / 'out'])['findings'] == []


def test_broken_rankings_and_metrics_are_told(evaluated):
  data, folder = evaluated
  path = folder / 'rankings-popularity.jsonl.gz'
  rows = read_lines(path)
  write_lines(path, [rows[0], '{"user_id": 1}'])
  with pytest.raises(UserError, match=r'rankings-popularity.jsonl.gz: line 2: not a line of rankings'):
    audit(data, [folder])
  write_lines(path, rows)
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match='truncated'):
    audit(data, [folder])
  (folder / 'metrics.json').write_text(json.dumps({'protocol': {}}))
  with pytest.raises(UserError, match='names no protocol'):
    audit(data, [folder])
  (folder / 'metrics.json').write_text('{')
  with pytest.raises(UserError, match='metrics.json: cannot be read as JSON'):
    audit(data, [folder])


def test_an_index_of_another_catalogue_is_a_note(whole_chain, chain):
  assert audit(whole_chain.data, [whole_chain.index])['findings'] == []
  rows = read_lines(chain.index / 'items.jsonl.gz')
  changed = [{**rows[0], 'title': 'Other'}, *rows[2:], {**rows[1], 'item_id': 'new\x1b[1m'}]
  json_lines.write(chain.index / 'items.jsonl.gz', changed)
  missing, more, other = audit(whole_chain.data, [chain.index])['findings']
  assert all((each['check'], each['severity'], each['count']) == (catalogue.CHECK, NOTE, 1) for each in (missing, more, other))
  assert rows[1]['item_id'] in missing['examples'][0] and rows[0]['item_id'] in other['examples'][0]
  assert 'new�[1m' in more['examples'][0]
  (chain.index / 'items.jsonl.gz').write_bytes(b'no gzip')
  with pytest.raises(UserError, match='is not gzip'):
    audit(whole_chain.data, [chain.index])
