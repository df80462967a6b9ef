"""The page of `calrec report`: whole HTML without network, texts that stay texts, the numbers of metrics.json."""

import json
import re
import struct

import pytest
from html_page_parser import Page
from refusals import refused
from small_shop import write_shop

from calrec_jax.data import histories as histories_lib
from calrec_jax.evaluation.evaluate import COLUMNS, evaluate
from calrec_jax.evaluation.report import curves, people
from calrec_jax.evaluation.report.examples_part import json_block
from calrec_jax.evaluation.report.report import gather, report
from calrec_jax.text.templates import ItemTemplate

HOSTILE = '</script><img src=x onerror=alert(1)>\u2028<!-- & "\''
TITLES = ['Strong Glue', HOSTILE, 'Garden Hose', 'Steel Hose', 'Duct Tape', 'Rope']
USERS = {f'user{number}': [(number + step * (1 + number % 2)) % 6 for step in range(5)] for number in range(12)}
USERS['<script>alert(2)</script>'] = [0, 1, 2, 1]


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  """A folder with `data`, `generations`, the evaluations `a` (of the texts) and `other` (of another protocol), `train`."""
  place = tmp_path_factory.mktemp('shop')
  write_shop(place, USERS, [{'title': title} for title in TITLES], [HOSTILE, 'Rope'], [-0.5, -2.0])
  data = histories_lib.load(place / 'data')
  template = ItemTemplate(fields=('title',))
  evaluate(histories=data, template=template, out=place / 'a', generations=place / 'generations')
  evaluate(histories=data, template=template, out=place / 'other', split='validation')
  record = {'command': ['calrec', HOSTILE], 'versions': {'python': '3'}, 'generations': str(place / 'generations'),
            'sasrec': {'epochs': [{'loss': 3.0, 'ndcg@10': 0.1}, {'loss': 2.0, 'ndcg@10': 0.2}]}}
  (place / 'a/run.json').write_text(json.dumps(record))
  (place / 'a/config.gin').write_text(f'# {HOSTILE}\nx = 1\n')
  (place / 'train').mkdir()
  (place / 'train/events.out.tfevents.1.x').write_bytes(events([(1, 'train/loss', 4.0), (2, 'train/loss', 2.5)]))
  return place


def events(scalars):
  """An events file, as the records of TensorBoard's writer."""
  from tensorboard.compat.proto import event_pb2, summary_pb2
  content = b''
  for step, tag, number in scalars:
    record = event_pb2.Event(step=step, summary=summary_pb2.Summary(
      value=[summary_pb2.Summary.Value(tag=tag, simple_value=number)])).SerializeToString()
    content += struct.pack('<QI', len(record), 0) + record + bytes(4)
  return content


@pytest.fixture(scope='module')
def text(shop):
  report([str(shop / 'a'), f'run={shop / "train"}'], shop / 'page.html', data=shop / 'data')
  return (shop / 'page.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def page(text):
  return Page(text)


def test_the_page_is_whole(page):
  assert not page.open and not page.wrong
  assert len(page.of('h1')) == 1 and len(page.of('title')) == 1 and page.of('html')[0][0]['lang'] == 'en'
  levels = [int(name[1]) for name, _, _ in page.elements if re.fullmatch('h[1-6]', name)]
  assert all(below - above <= 1 for above, below in zip(levels, levels[1:], strict=False))
  ids = [found['id'] for _, found, _ in page.elements if 'id' in found]
  assert len(ids) == len(set(ids))
  assert all(found['scope'] in ('row', 'col') for found, _ in page.of('th'))
  assert {name for name, _, _ in page.elements} >= {'section', 'nav', 'main', 'svg', 'details'}


def test_nothing_is_asked_of_the_network_and_no_attribute_runs(page, text):
  for name, found, _ in page.elements:
    assert not [key for key in found if key.startswith('on') or key in ('src', 'style')], name
    assert found.get('href', '#').startswith('#')
  assert 'url(' not in text and '@import' not in text
  assert "default-src 'none'" in page.of('meta', **{'http-equiv': 'Content-Security-Policy'})[0][0]['content']


def test_hostile_texts_are_texts(page):
  shown = HOSTILE.replace('\u2028', ' ')
  assert not page.of('img') and len(page.of('script')) == 2
  assert any(shown in said for _, said in page.of('li'))
  assert any(shown in said for _, said in page.of('pre'))
  assert [said for _, said in page.of('h3') if said == 'User <script>alert(2)</script>']


def test_the_json_comes_back(page, shop):
  found = gather([str(shop / 'a')], data=shop / 'data')
  said = page.of('script', id='examples-data')[0][1]
  assert '<' not in said and said.isascii()
  assert json.loads(said) == json.loads(json.dumps(found['people']))
  assert json.loads(json_block([HOSTILE, '-->', ']]>'])) == [HOSTILE, '-->', ']]>']


def test_the_numbers_are_those_of_metrics_json(text, shop):
  measured = json.loads((shop / 'a/metrics.json').read_text())
  table = re.search(r'<h2 id="results">.*?</table>', text, re.S)[0]
  rows = {re.sub('<.*?>', '', cells[0]): cells[1:] for cells in (
    re.findall(r'<t[hd].*?>(.*?)</t[hd]>', row) for row in re.findall(r'<tr>(.*?)</tr>', table)[1:])}
  best = max(means['mrr'] for means in measured['methods'].values())
  for title, method in (('CALRec', 'calrec'), ('Last item', 'last_item'), ('Popularity', 'popularity')):
    for cell, column in zip(rows[title], COLUMNS, strict=True):
      low, high = measured['intervals'][method][column]
      value = measured['methods'][method][column]
      assert re.sub('<.*?>', '', cell) == f'{value:.4f} [{low:.3f}, {high:.3f}]'
    assert ('<strong>' in rows[title][-1]) == (measured['methods'][method]['mrr'] == best)
  assert measured['protocol']['hash'] in table and f'{measured["users"]:,} users' in table


def test_a_user_is_shown_as_the_files_have_it(shop):
  one = next(each for each in gather([str(shop / 'a')], data=shop / 'data')['people'] if each['user'].startswith('<'))
  shown = HOSTILE.replace('\u2028', ' ')
  assert one['history'] == ['Strong Glue', shown, 'Garden Hose'] and one['truth'] == shown
  assert one['repeat'] is True and one['cold'] is False
  name, texts, n_texts = one['texts'][0]
  assert n_texts == 2 and texts[0][1] == shown and round(texts[0][0], 4) == 0.6065
  calrec = one['methods'][0]
  assert calrec['title'] == 'CALRec' and calrec['better'] == 0 and calrec['hit']
  assert calrec['top'][0][0] == shown and calrec['top'][0][2] is True and len(calrec['top']) == 6


def test_the_draw_knows_no_result(shop):
  user_ids = list(USERS)
  assert people.drawn(user_ids, 3) == people.drawn(user_ids[::-1], 3) == people.drawn(user_ids, 9)[:3]
  found = gather([str(shop / 'a')], n_examples=3)
  assert [each['user'] for each in found['people']] == people.drawn(user_ids, 3)
  assert found['people'][0]['history'] == [] and found['people'][0]['truth'].startswith('i')


def test_equal_inputs_give_equal_bytes(shop, text):
  report([str(shop / 'a'), f'run={shop / "train"}'], shop / 'again.html', data=shop / 'data')
  assert (shop / 'again.html').read_text(encoding='utf-8') == text


def test_a_training_run_alone_has_curves(shop):
  assert report([str(shop / 'train')], shop / 'curves.html')['methods'] == 0
  found = Page((shop / 'curves.html').read_text(encoding='utf-8'))
  labels = [each['aria-label'] for each, _ in found.of('svg', role='img')]
  assert len(labels) == 1 and labels[0].startswith('train/loss by step') and labels[0].endswith('from 4 to 2.5')


def test_two_evaluations_of_one_protocol_share_their_rows(shop):
  evaluate(histories=histories_lib.load(shop / 'data'), template=ItemTemplate(fields=('title',)), out=shop / 'b')
  found = gather([f'one={shop / "a"}', f'two={shop / "b"}'])
  assert sorted(row['method'] for row in found['rows']) == ['calrec', 'last_item', 'popularity', 'transitions']
  assert found['compared']['differences']


def events_cut(tmp_path):
  content = events([(1, 'train/loss', 4.0), (2, 'train/loss', 3.0)])
  (tmp_path / 'events.out.tfevents.1.a').write_bytes(content[:-9])
  (tmp_path / 'events.out.tfevents.2.a').write_bytes(events([(2, 'train/loss', 2.0), (3, 'x', 1.0)]))


def test_events_that_are_cut_off_and_go_on_in_a_second_file(tmp_path):
  events_cut(tmp_path)
  found = curves.read_events(tmp_path)
  assert found == {'train/loss': [(1, 4.0), (2, 2.0)], 'x': [(3, 1.0)]}
  assert list(curves.training_curves(found)) == ['train/loss']


def test_wrong_inputs_are_named_and_nothing_is_written(shop, tmp_path):
  out = tmp_path / 'page.html'
  a, other, train = (str(shop / name) for name in ('a', 'other', 'train'))
  refused(lambda: report([a, other], out), 'cannot stand in one table', 'protocols differ')
  refused(lambda: report([], out), 'no run')
  refused(lambda: report([str(shop / 'absent')], out), 'absent', 'no such folder')
  refused(lambda: report([str(shop / 'generations')], out), 'neither')
  refused(lambda: report([f'{train}:calrec'], out), 'has no methods')
  refused(lambda: report([f'{a}:dense'], out), "no method 'dense'")
  refused(lambda: report([a], out, n_examples=-1), 'examples = -1')
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data/items.jsonl').write_text('{"item_id": "a", "title": "t"}\n')
  (tmp_path / 'data/sequences.jsonl').write_text('{"user_id": "u", "item_ids": ["a", "a", "a"]}\n')
  refused(lambda: report([a], out, data=tmp_path / 'data'), 'is not the data set')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['data']
  out.write_text('mine')
  refused(lambda: report([a], out), 'already in use')
  assert out.read_text() == 'mine'
