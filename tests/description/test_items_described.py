"""What is counted of items, against plain loops over random data sets; and what each problem is."""

import numpy as np
from hypothesis import given
from random_histories import data_sets
from toy_corpus import toy_source

from calrec_jax.data.histories import FIELDS
from calrec_jax.description import items
from calrec_jax.text.templates import ItemTemplate


@given(data_sets())
def test_problems_are_counted_in_items_and_in_events(data):
  found = {each['problem']: each for each in items.problems(data)}
  events = data.events.tolist()
  expected = {f'{field} unknown': [not item[field] for item in data.items] for field in FIELDS}
  expected['all attributes unknown'] = [set(item.values()) == {''} for item in data.items]
  expected['title is the id'] = [item['title'] == id_ for item, id_ in zip(data.items, data.item_ids, strict=True)]
  expected['title of more than 200 characters'] = [len(item['title']) > 200 for item in data.items]
  expected['title without a letter'] = [item['title'] in ('1999', '$5.00') for item in data.items]
  expected['title with markup'] = [item['title'] in ('a <b>b</b>', '<script>alert(1)</script>', 'a\u202eb')
                                   and '<' in item['title'] for item in data.items]
  expected['title with misread characters'] = [item['title'] == 'Ã©tÃ©' for item in data.items]
  expected['price that is no price'] = [item['price'] not in ('', '$5.00', '1999') for item in data.items]
  expected['in no history'] = [number not in events for number in range(len(data.items))]
  assert found.keys() == {problem for problem, mark in expected.items() if any(mark)}
  for problem, each in found.items():
    members = np.flatnonzero(expected[problem]).tolist()
    assert each['items']['count'] == len(members) and each['items']['share'] == len(members) / len(data.items)
    n_events = sum(events.count(item) for item in members)
    assert each['events']['count'] == n_events
    popular = max(members, key=events.count)
    assert each['examples'][0].startswith(f'{data.item_ids[popular]} (') and len(each['examples']) == min(len(members), 3)
  shown = [each['items']['count'] for each in items.problems(data)]
  assert shown == sorted(shown, reverse=True)


@given(data_sets())
def test_texts_that_several_items_share(data):
  template = ItemTemplate(fields=('title', 'brand'))
  texts = [template.item_text(item) for item in data.items]
  members = [number for number, text in enumerate(texts) if texts.count(text) > 1]
  found, events = items.duplicates(data, template), data.events.tolist()
  assert found['texts'] == len({texts[number] for number in members})
  assert found['items']['count'] == len(members)
  assert found['events']['count'] == sum(events.count(number) for number in members)
  assert len(found['most']) == min(found['texts'], items.TEXTS)
  for each in found['most']:
    assert each['items'] == texts.count(each['text'])
    assert each['events'] == sum(events.count(number) for number in members if texts[number] == each['text'])
  if found['most']:
    assert found['most'][0]['items'] == max(map(texts.count, texts))


def test_what_is_left_of_tags_and_scripts_is_found():
  titles = ['Industrial & Scientific />', 'b</span>', 'var x = 1', '.a { color: red }', 'plain']
  data = toy_source([[1]] * len(titles), [list(range(len(titles)))]).histories
  for item, title in zip(data.items, titles, strict=True):
    item['title'] = title
  [found] = [each for each in items.problems(data) if each['problem'] == 'title with markup']
  assert found['items']['count'] == 4


def test_titles_that_only_look_odd_are_no_problem():
  data = toy_source([[1]] * 4, [[0, 1, 2, 3]]).histories
  for item, title in zip(data.items, ['less < more', 'SÃO PAULO', 'Ördög 7', 'a {b} c'], strict=True):
    item['title'] = title
  assert {each['problem'] for each in items.problems(data)} == {'category unknown', 'brand unknown', 'price unknown'}


def test_ids_that_differ_by_case_or_blanks_are_a_problem():
  data = toy_source([[1]] * 4, [[0, 1, 1, 2]]).histories
  data.item_ids[:] = ['b 1', 'B1', 'b2', 'b1\t']
  [found] = [each for each in items.problems(data) if each['problem'] == 'id of another item but for case and blanks']
  assert (found['items']['count'], found['events']['count']) == (3, 3) and found['examples'][0].startswith('B1 (')
