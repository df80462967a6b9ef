"""Leaks inside one data set: each is planted in clean data, and found there alone."""

import dataclasses

import numpy as np
import pytest
from audit_shop import DAY, changed, shop, split_rows, with_rows

from calrec_jax.data import amazon, synthetic
from calrec_jax.data.histories import Histories, load
from calrec_jax.evaluation.audit import id_order, texts, times, users
from calrec_jax.evaluation.audit.audit import check_data
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS, Finding


def found(data: Histories) -> Finding:
  """The one finding in a data set."""
  findings = list(check_data(data))
  assert len(findings) == 1, findings
  return findings[0]


def test_clean_data_has_no_finding(clean):
  assert list(check_data(clean)) == []
  assert list(check_data(shop(seed=1, timed=False))) == []


def test_a_generated_store_has_no_finding(tmp_path):
  synthetic.synthesize(tmp_path / 'store', users=150, items=60, categories=1, seed=3, progress=False)
  name = next((tmp_path / 'store').glob('*_5.json.gz')).name.removesuffix('_5.json.gz')
  amazon.prepare_dumps([tmp_path / f'store/{name}_5.json.gz'], [tmp_path / f'store/meta_{name}.json.gz'], name='store',
                       out=tmp_path / 'data', progress=False)
  assert list(check_data(load(tmp_path / 'data'))) == []


def test_a_copy_whose_target_is_in_the_others_train_part_is_serious(clean):
  def copy(rows, times):
    rows[5], times[5] = np.append(rows[4], [1, 2, 3]), np.append(times[4], times[4][-1] + [DAY, 2 * DAY, 3 * DAY])

  one = found(changed(clean, copy))
  assert (one.check, one.severity, one.count) == (users.TWINS, SERIOUS, 1)
  assert clean.user_ids[4] in one.examples[0] and clean.user_ids[5] in one.examples[0]


@pytest.mark.parametrize('extra', [0, 1])
def test_a_copy_whose_target_is_held_out_too_is_a_note(clean, extra):
  def copy(rows, times):
    rows[5], times[5] = np.append(rows[4], [1] * extra), np.append(times[4], [times[4][-1] + DAY] * extra)

  one = found(changed(clean, copy))
  assert (one.check, one.severity) == (users.TWINS, NOTE)
  assert one.count == (2 if extra == 0 else 1)


def test_histories_that_chance_makes_equal_are_let_pass():
  """All go round a shop of 60 items in steps of one or two: one in fifteen has bought as another did, and nobody copied."""
  rng = np.random.default_rng(0)
  rows = [(rng.integers(60) + np.cumsum(rng.integers(1, 3, rng.integers(5, 9)))) % 60 for _ in range(300)]
  data = with_rows(shop(n_users=300, n_items=60), rows, None)
  assert 10 <= len(users._beginnings(data)) <= users.MANY * 300
  assert list(users.check_twins(data)) == []


def test_many_equal_histories_are_a_note_whatever_chance_makes():
  data = shop(n_users=60, n_items=40)
  [one] = users.check_twins(with_rows(data, [(start % 3 + np.arange(6)) % 40 for start in range(60)], None))
  assert (one.severity, one.count) == (NOTE, 60) and 'few items' in one.message


def test_short_histories_may_be_equal(clean):
  def shorten(rows, times):
    for user in (4, 5):
      rows[user], times[user] = rows[4][:4], times[4][:4]

  assert list(users.check_twins(changed(clean, shorten))) == []


def test_time_that_goes_back_is_serious(clean):
  def swap(rows, times):
    times[7][-1] = times[7][0] - DAY

  one = found(changed(clean, swap))
  assert (one.check, one.severity, one.count) == (times.ORDER, SERIOUS, 1)
  assert clean.user_ids[7] in one.examples[0]


def test_items_that_only_the_future_holds_are_a_note(clean):
  """Of each third user the target is a new item, which the two users after it buy years later."""
  n_items = len(clean.item_ids)
  new = np.arange(n_items, n_items + 40)

  def plant(rows, times):
    for number, item in enumerate(new):
      rows[3 * number][-1] = rows[3 * number + 1][0] = rows[3 * number + 2][0] = item
      times[3 * number + 1] += 9000 * DAY
      times[3 * number + 2] += 9000 * DAY

  more = dataclasses.replace(clean, item_ids=[*clean.item_ids, *(f'new{item}' for item in new)],
                             items=[*clean.items, *({**clean.items[0], 'title': f'w{item} x{item}'} for item in new)])
  [one] = times.check_future(changed(more, plant))
  assert (one.check, one.severity) == (times.FUTURE, NOTE) and 40 <= one.count < 60
  assert clean.user_ids[0] in one.examples[0] and 'days before any train part' in one.examples[0]
  assert list(times.check_future(changed(clean, lambda rows, times: None))) == []


def tied(rows, times):
  for each in times:
    each[:] = each[0]


def by_id(data: Histories, reverse: bool = False) -> Histories:
  """All of a user's events are of one time, and sorted by id."""
  def sort(rows, times):
    tied(rows, times)
    for number, row in enumerate(rows):
      rows[number] = np.array(sorted(row, key=lambda item: data.item_ids[item], reverse=reverse))

  return changed(data, sort)


@pytest.mark.parametrize('reverse', [False, True])
def test_ties_in_the_order_of_ids_are_serious(clean, reverse):
  both = list(id_order.check_id_order(by_id(clean, reverse)))
  assert [(each.check, each.severity) for each in both] == [(id_order.CHECK, SERIOUS)] * 2
  assert both[0].count == len(clean.events) - len(clean.user_ids) and both[1].count == len(clean.user_ids)
  assert f'in {0 if reverse else 100:.1f}% of' in both[0].message and '--ties hashed' in both[0].message
  first, second = sorted((clean.item_ids[item] for item in clean.history(0)), reverse=reverse)[:2]
  assert f': {first} (' in both[0].examples[0] and f'then {second} (' in both[0].examples[0]


def test_the_order_of_ids_counts_where_times_are_equal_alone(clean):
  rows, times = split_rows(by_id(clean))
  apart = with_rows(clean, rows, [np.arange(len(each)) * DAY for each in times])
  assert list(id_order.check_id_order(apart)) == []


def test_without_times_the_last_two_events_count(clean):
  rows, _ = split_rows(by_id(clean))
  [one] = id_order.check_id_order(with_rows(clean, rows, None))
  assert one.severity == NOTE and one.count == 120 and 'no timestamps' in one.message
  ties = with_rows(clean, *split_rows(changed(clean, tied)))
  assert list(id_order.check_id_order(ties)) == []  # of one time, in a random order


def with_title(data: Histories, item: int, other: int, **changes) -> Histories:
  items = [dict(each) for each in data.items]
  items[item] = items[other] | changes
  return dataclasses.replace(data, items=items)


def test_the_targets_text_under_another_id_is_a_note(clean):
  """A quarter of the targets is item 0, after item 1: of the same text, or of one that differs in a word of twelve."""
  def plant(rows, times):
    for user in range(0, 120, 4):
      rows[user] = np.array([1, *rows[user][(rows[user] > 1)][:4], 0])
      times[user] = times[user][0] + DAY * np.arange(6)[:len(rows[user])]

  long = 'one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen'
  data = changed(clean, plant)
  other = 'one two three four other words'
  for changes, equal, near in (({}, 30, 0), ({'title': long + ' twenty'}, 0, 30), ({'title': other}, 0, 0)):
    base = with_title(data, 0, 0, title=long)
    findings = list(texts.check_texts(with_title(base, 1, 0, **changes)))
    if not equal + near:
      assert findings == []
      continue
    assert (findings[0].check, findings[0].severity, findings[0].count) == (texts.CHECK, NOTE, 30)
    assert f'the same text ({equal})' in findings[0].message and f'nearly the same ({near};' in findings[0].message
    assert clean.item_ids[0] in findings[0].examples[0] and clean.item_ids[1] in findings[0].examples[0]


def test_repeats_of_the_target_are_no_other_item(clean):
  def repeat(rows, times):
    for row in rows:
      row[-1] = row[0]

  assert list(texts.check_texts(changed(clean, repeat))) == []
  [one] = texts.check_texts(changed(clean, repeat), most=-1)
  assert one.count == 0 and 'Repeats of the target itself: 120.' in one.message
