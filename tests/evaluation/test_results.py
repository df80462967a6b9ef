"""Evaluation folders read back: what evaluate wrote, or one line that says what is wrong."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest

from calrec_jax.errors import UserError
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.evaluation.results import Places, check_comparable, read_result
from calrec_jax.text.templates import ItemTemplate


@pytest.fixture
def run(shop, tmp_path):
  """Evaluates the shop, or the histories given, into the folder of this name."""
  def run(name='run', histories=shop, **options):
    evaluate(histories=histories, template=ItemTemplate(fields=('title',)), out=tmp_path / name, **options)
    return tmp_path / name
  return run


def edit_metrics(folder, change):
  path = folder / 'metrics.json'
  found = json.loads(path.read_text())
  change(found)
  path.write_text(json.dumps(found))


def edit_lines(folder, change, method='last_item'):
  path = folder / f'rankings-{method}.jsonl.gz'
  lines = gzip.decompress(path.read_bytes()).decode().splitlines()
  path.write_bytes(gzip.compress('\n'.join(change(lines)).encode()))


def one_line(call, *words):
  with pytest.raises(UserError) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message and len(message) < 600 and message.endswith('.')
  for word in words:
    assert word in message


def test_a_folder_is_read_as_it_was_written(run, shop):
  folder = run()
  written = json.loads((folder / 'metrics.json').read_text())
  result = read_result(folder)
  assert (result.folder, result.protocol, result.data) == (folder, written['protocol'], written['data'])
  assert result.user_ids == shop.user_ids
  assert list(result.methods) == list(written['methods'])
  for method, places in result.methods.items():
    assert places.better_U.dtype == places.tied_U.dtype == np.int64
    for metric, value_U in expected_metrics(places.better_U, places.tied_U).items():
      assert value_U.mean() == written['methods'][method][metric]


def test_places_are_in_the_order_of_the_file(run):
  places = read_result(run(oracle=lambda context, item_ids: np.arange(6.0))).methods['ceiling']
  assert places.better_U.tolist() == [2, 3, 0]  # of the items g1 g2 h1 h2 t1 t2 the targets are h2, h1, t2
  assert places.tied_U.tolist() == [0, 0, 0]


def test_only_the_methods_asked_for_are_read(run):
  folder = run()
  (folder / 'rankings-popularity.jsonl.gz').unlink()
  assert list(read_result(folder, ['last_item']).methods) == ['last_item']
  one_line(lambda: read_result(folder, ['calrec']), str(folder), "'calrec'", 'last_item')


def test_more_keys_do_no_harm_wherever_they_are(run):
  folder = run()
  edit_metrics(folder, lambda found: (found.update(slices={}), found['methods']['last_item'].update(auc=0.5, by_length={})))
  edit_lines(folder, lambda lines: [line.replace('{', '{"more": [1], ', 1) for line in lines])
  edit_lines(folder, lambda lines: [json.dumps({key: value for key, value in json.loads(line).items() if key != 'top'})
                                    for line in lines], 'popularity')
  assert read_result(folder).user_ids == ['ann', 'bob', 'cat']


def test_an_id_that_looks_like_the_key_is_no_key(run, shop):
  odd_id = 'x", "top": ['
  shop.user_ids[0] = odd_id
  assert read_result(run()).user_ids == [odd_id, 'bob', 'cat']


def test_places_are_the_same_if_all_of_them_are():
  places = lambda better, tied: Places(np.array(better), np.array(tied))
  assert places([1, 2], [0, 0]).same(places([1, 2], [0, 0]))
  assert not places([1, 2], [0, 0]).same(places([1, 2], [0, 1]))
  assert not places([1, 2], [0, 0]).same(places([1, 3], [0, 0]))


def rules(change):
  """Changes the protocol of a folder."""
  return lambda folder: edit_metrics(folder, lambda found: change(found['protocol']))


def cut(path, n_bytes):
  path.write_bytes(path.read_bytes()[:n_bytes])


BAD = {  # what is said -> what is done to the folder
  'no such folder': shutil.rmtree,
  'has no metrics.json': lambda folder: (folder / 'metrics.json').unlink(),
  'metrics.json: is not JSON': lambda folder: cut(folder / 'metrics.json', 50),
  'metrics.json: is not JSON (': lambda folder: (folder / 'metrics.json').write_bytes(b'\xff\xfe{}'),
  'holds a list': lambda folder: (folder / 'metrics.json').write_text('[]'),
  'a result without a protocol and its hash is refused': lambda folder: edit_metrics(folder, lambda f: f.pop('protocol')),
  'a result without a protocol and its hash': rules(lambda protocol: protocol.pop('hash')),
  'a result without a protocol': rules(lambda protocol: protocol.update(name=None)),
  'does not fit the rules of its protocol': rules(lambda protocol: protocol.update(seen_items='dropped')),
  'does not fit the rules': rules(lambda protocol: protocol.update(hash='0123456789abcdef')),
  'expected "data"': lambda folder: edit_metrics(folder, lambda found: found['data'].pop('fingerprint')),
  'expected "methods"': lambda folder: edit_metrics(folder, lambda found: found.update(methods={})),
  'expected "methods" with': lambda folder: edit_metrics(folder, lambda found: found.update(methods={'last_item': None})),
  'rankings-last_item.jsonl.gz: no such file': lambda folder: (folder / 'rankings-last_item.jsonl.gz').unlink(),
  'rankings-last_item.jsonl.gz: is truncated': lambda folder: cut(folder / 'rankings-last_item.jsonl.gz', 150),
  'rankings-last_item.jsonl.gz: is not gzip': lambda folder: (folder / 'rankings-last_item.jsonl.gz').write_text('{}'),
  'last_item.jsonl.gz: has 2 users, but metrics.json has 3': lambda folder: edit_lines(folder, lambda lines: lines[:2]),
  "last_item.jsonl.gz: has other users than the other rankings (such as 'dan' and 'bob')": lambda folder: edit_lines(
    folder, lambda lines: [line.replace('"bob"', '"dan"') for line in lines]),
  'has other users than': lambda folder: edit_lines(folder, lambda lines: lines[::-1]),
  'has 3 lines of 2 users': lambda folder: edit_lines(folder, lambda lines: [*lines[:2], lines[1]]),
  'has no users': lambda folder: edit_lines(folder, lambda lines: []),
  'line 2: expected {"user_id"': lambda folder: edit_lines(folder, lambda lines: [lines[0], lines[1][:30], lines[2]]),
  'line 3: expected': lambda folder: edit_lines(folder, lambda lines: [*lines[:2], lines[2].replace('"tied"', '"ties"')]),
  'line 1: expected': lambda folder: edit_lines(
    folder, lambda lines: [re.sub('"tied": .', '"tied": true', lines[0]), *lines[1:]]),
  'line 1: -1 better': lambda folder: edit_lines(
    folder, lambda lines: [re.sub('"better": .', '"better": -1', lines[0]), *lines[1:]]),
  'line 1: 2 better and 4 tied of 6 items': lambda folder: edit_lines(
    folder, lambda lines: [lines[0].replace('"better": 1, "tied": 4', '"better": 2, "tied": 4'), *lines[1:]]),
  'of 6 items cannot be': lambda folder: edit_lines(
    folder, lambda lines: [re.sub('"better": .', '"better": 10000000000000000', lines[0]), *lines[1:]]),
  'not of one run': lambda folder: shutil.copy(folder / 'rankings-popularity.jsonl.gz', folder / 'rankings-last_item.jsonl.gz'),
}


@pytest.mark.parametrize(('told', 'harm'), BAD.items(), ids=BAD.keys())
def test_bad_folders(run, told, harm):
  folder = run()
  harm(folder)
  one_line(lambda: read_result(folder), str(folder), told)


def test_equal_rules_data_and_users_stand_in_one_table(run):
  check_comparable([])
  check_comparable([read_result(run('one')), read_result(run('two', oracle=lambda context, item_ids: np.ones(6)))])


def test_other_rules_are_refused_and_named(run):
  one, two = read_result(run('one')), read_result(run('two', split='validation'))
  one_line(lambda: check_comparable([one, one, two]), str(one.folder), str(two.folder), 'the protocols differ',
           "split: 'test', 'validation'")
  few = read_result(run('few', max_users=2))
  one_line(lambda: check_comparable([one, few]), 'the protocols differ (users: ', 'the first 2')


def test_other_data_are_refused_and_named(run, shop):
  one = read_result(run('one'))
  shop.items[0]['title'] = 'Weak Glue'
  shop.__dict__.pop('fingerprint', None)
  two = read_result(run('two'))
  one_line(lambda: check_comparable([one, two]), str(one.folder), str(two.folder), 'the data sets differ',
           one.data['fingerprint'], two.data['fingerprint'])


def test_other_users_are_refused_and_named(run):
  one, folder = read_result(run('one')), run('two')
  for method in one.methods:
    edit_lines(folder, lambda lines: [line.replace('"ann"', '"eve"') for line in lines], method)
  one_line(lambda: check_comparable([one, read_result(folder)]), str(folder), "the users differ (such as 'ann' and 'eve')")


def test_a_rule_that_only_one_has_and_long_rules_are_told_briefly(run):
  one, two = read_result(run('one')), read_result(run('two'))
  two.protocol.update(hash='other', window='x' * 500)
  one_line(lambda: check_comparable([one, two]), "window: none, 'xxx", '…')
  two.protocol.update(a=1, b=2, c=3, d=4)
  one_line(lambda: check_comparable([one, two]), 'b: none, 2; and 2 more')
