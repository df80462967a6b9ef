"""The table of several evaluations: one row a method, seeds under one name, and the differences that hold."""

import json
import os
import re

import numpy as np
import pytest
import toy_corpus
from refusals import refused

from calrec_jax.evaluation.compare import Run, compare, parse_run, table
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.evaluation.results import read_result
from calrec_jax.text.templates import ItemTemplate

N_USERS, N_ITEMS = 60, 12


def store(seed=0):
  rng = np.random.default_rng(seed)
  return toy_corpus.toy_source([[item] for item in range(N_ITEMS)], rng.integers(N_ITEMS, size=(N_USERS, 5)).tolist()).histories


def guesser(skill, seed):
  """An oracle that knows the target with some skill; equal seeds give equal rankings."""
  data, rng = store(), np.random.default_rng(seed)
  bought = [[data.item_ids[item] for item in data.history(user)] for user in range(N_USERS)]
  target_of = {tuple(items[:-1]): data.item_ids.index(items[-1]) for items in bought}

  def scores_I(context, item_ids):
    scores = rng.normal(size=N_ITEMS)
    scores[target_of[tuple(context)]] += skill
    return scores
  return scores_I


def run_of(place, oracle=None, histories=None, **options):
  evaluate(histories=histories or store(), template=ItemTemplate(fields=('title',)), out=place, oracle=oracle, **options)
  return str(place)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Folders: a1, a2, a3 are seeds of a model, b is a far better one, weak has baselines alone. The model is the `ceiling`."""
  place = tmp_path_factory.mktemp('runs')
  made = {f'a{seed}': run_of(place / f'a{seed}', guesser(0.7, seed)) for seed in (1, 2, 3)}
  return {**made, 'b': run_of(place / 'b', guesser(2.5, 4)), 'weak': run_of(place / 'weak')}


def names(comparison):
  return [row['name'] for row in comparison['methods']]


def row_of(comparison, name):
  return next(row for row in comparison['methods'] if row['name'] == name)


@pytest.mark.parametrize(('text', 'run'), [
  ('runs/a', Run('runs/a')), ('runs/a/', Run('runs/a')), ('/x:y/a', Run('/x:y/a')), ('x=1/a', Run('1/a', 'x')),
  ('large=runs/a', Run('runs/a', 'large')), ('runs/a:dense', Run('runs/a', None, 'dense')),
  ('large=runs/a:dense', Run('runs/a', 'large', 'dense')), ('runs/lr=0.1/a', Run('runs/lr=0.1/a')),
  ('large=runs/lr=0.1:dense', Run('runs/lr=0.1', 'large', 'dense')), ('=a', Run('=a')), (':a', Run(':a')), ('a:', Run('a:')),
])
def test_what_an_argument_names(text, run):
  assert parse_run(text) == run


def test_a_folder_that_is_there_is_taken_as_it_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('lr=1', '12:30', 'x=12:30'):
    os.mkdir(name)
    assert parse_run(name) == Run(name)
  assert parse_run('y=lr=1') == Run('lr=1', 'y')
  assert parse_run('12:30:dense') == Run('12:30', None, 'dense')
  assert parse_run('z=12:30') == Run('12:30', 'z')


def test_one_folder_gives_the_means_of_its_metrics_json(runs):
  found = compare([runs['b']], metrics=['recall@1', 'mrr'])
  with open(f'{runs["b"]}/metrics.json', encoding='utf-8') as file:
    written = json.load(file)
  assert found['protocol'] == written['protocol'] and found['data'] == written['data'] and found['users'] == N_USERS
  assert found['metrics'] == ['recall@1', 'mrr', 'ndcg@10']
  assert sorted(names(found)) == sorted(written['methods'])
  for row in found['methods']:
    for metric, estimate in row['metrics'].items():
      assert estimate['mean'] == pytest.approx(written['methods'][row['name']][metric], abs=1e-15)
      assert estimate['low'] < estimate['mean'] < estimate['high'] and estimate['deviation'] is None
  ndcg = [row['metrics']['ndcg@10']['mean'] for row in found['methods']]
  assert ndcg == sorted(ndcg, reverse=True) and found['baseline'] == names(found)[0] == 'ceiling'
  assert json.loads(json.dumps(found)) == found


def test_baselines_of_several_folders_appear_once(runs):
  found = compare([f'base={runs["a1"]}', f'large={runs["b"]}', runs['weak']])
  assert sorted(names(found)) == ['base:ceiling', 'large:ceiling', 'last_item', 'popularity', 'transitions']
  assert row_of(found, 'popularity')['folders'] == [runs['a1'], runs['b'], runs['weak']]
  assert row_of(found, 'popularity')['title'] == 'Popularity'
  assert row_of(found, 'large:ceiling')['title'].startswith('large: Ceiling')


def test_a_method_of_two_unnamed_folders_is_told_by_the_folder(runs):
  found = compare([runs['a1'], runs['b']])
  assert {f'{runs["a1"]}:ceiling', f'{runs["b"]}:ceiling', 'popularity'} <= set(names(found))
  assert names(compare([runs['a1'], runs['a1'] + '/'])) == names(compare([runs['a1']]))
  assert f'{runs["b"]}:ceiling' not in names(compare([f'{runs["a1"]}:popularity', runs['b']]))


def test_one_method_can_be_picked(runs):
  found = compare([f'{runs["a1"]}:popularity', f'best={runs["b"]}:ceiling', f'{runs["weak"]}:popularity'])
  assert names(found) == ['best', 'popularity']
  assert [row['title'] for row in found['methods']] == ['best', 'Popularity']


def test_one_name_for_several_folders_makes_them_seeds(runs):
  folders = [runs[f'a{seed}'] for seed in (1, 2, 3)]
  found = compare([*(f'small={folder}' for folder in folders), f'large={runs["b"]}'])
  small = row_of(found, 'small:ceiling')
  assert (small['seeds'], small['folders']) == (3, folders)
  means = [compare([folder])['methods'] for folder in folders]
  means = [next(row for row in rows if row['method'] == 'ceiling')['metrics']['ndcg@10']['mean'] for rows in means]
  assert small['metrics']['ndcg@10']['mean'] == pytest.approx(np.mean(means))
  assert small['metrics']['ndcg@10']['deviation'] == pytest.approx(np.std(means, ddof=1))
  assert row_of(found, 'popularity')['seeds'] == 1 and row_of(found, 'popularity')['metrics']['mrr']['deviation'] is None
  difference = next(d for d in found['differences'] if d['method'] == 'small:ceiling' and d['metric'] == 'ndcg@10')
  large = row_of(found, 'large:ceiling')['metrics']['ndcg@10']['mean']
  assert difference['difference'] == pytest.approx(np.mean(means) - large)
  assert difference['baseline'] == 'large:ceiling' and difference['holds'] and difference['high'] < 0


def test_seeds_narrow_the_interval_of_a_difference(runs):
  """Each user's mean over seeds has less noise than one seed's."""
  width = lambda found: [d['high'] - d['low'] for d in found['differences'] if d['metric'] == 'mrr']
  one = compare([f'x={runs["a1"]}:ceiling', f'{runs["weak"]}:popularity'])
  three = compare([*(f'x={runs[f"a{seed}"]}:ceiling' for seed in (1, 2, 3)), f'{runs["weak"]}:popularity'])
  assert width(three)[0] < width(one)[0]


def test_a_method_never_differs_from_itself(runs):
  found = compare([f'one={runs["b"]}:ceiling', f'two={runs["b"]}:ceiling'], resamples=100)
  assert names(found) == ['one', 'two'] and found['baseline'] == 'one'
  for each in found['differences']:
    assert (each['difference'], each['low'], each['high'], each['p'], each['holds']) == (0, 0, 0, 1, False)


def test_against_the_best_all_pairs_are_the_family(runs):
  found = compare([runs['b']])
  pairs = [(each['method'], each['baseline']) for each in found['differences'] if each['metric'] == 'mrr']
  assert found['best'] and len(pairs) == len({frozenset(pair) for pair in pairs}) == 6
  assert [pair[1] for pair in pairs[:3]] == ['ceiling'] * 3
  for each in found['differences']:
    assert each['p'] <= each['p_corrected'] <= 6 * each['p'] and each['holds'] == (each['p_corrected'] < 0.05)
  smallest = min((each for each in found['differences'] if each['metric'] == 'mrr'), key=lambda each: each['p'])
  assert smallest['p_corrected'] == pytest.approx(6 * smallest['p'])


@pytest.mark.parametrize('baseline', ['popularity', 'Popularity'])
def test_against_a_baseline_the_others_are_the_family(runs, baseline):
  found = compare([runs['b']], baseline=baseline)
  assert (found['baseline'], found['best']) == ('popularity', False)
  assert {each['baseline'] for each in found['differences']} == {'popularity'}
  assert sorted(each['method'] for each in found['differences'] if each['metric'] == 'mrr') == [
    'ceiling', 'last_item', 'transitions']
  ceiling = next(each for each in found['differences'] if (each['method'], each['metric']) == ('ceiling', 'ndcg@10'))
  assert ceiling['difference'] > 0 and ceiling['low'] > 0 and ceiling['holds']


def test_the_seed_gives_the_numbers_and_no_other_row_moves_them(runs):
  found = compare([runs['b'], runs['a1']], resamples=500)
  assert compare([runs['b'], runs['a1']], resamples=500) == found
  assert compare([runs['b'], runs['a1']], resamples=500, seed=1)['methods'] != found['methods']
  alone = compare([f'{runs["a1"]}:popularity'], resamples=500)
  assert row_of(alone, 'popularity')['metrics'] == row_of(found, 'popularity')['metrics']


def test_the_table(runs):
  seeds = [f'small={runs[f"a{seed}"]}' for seed in (1, 2, 3)]
  found = compare([*seeds, f'large={runs["b"]}:ceiling', f'{runs["weak"]}:popularity'], metrics=['mrr', 'ndcg@10'],
                  resamples=1000)
  assert [row['title'] for row in found['methods']][0] == 'large'
  lines = table(found).splitlines()
  assert lines[0] == (f'toy, test split: 60 users (protocol {found["protocol"]["name"]}, {found["protocol"]["hash"]})')
  assert lines[1].split() == ['mrr', 'ndcg@10']
  number = r'\d\.\d{4}'
  assert re.fullmatch(rf'large +{number} \[{number}, {number}\] +{number} \[{number}, {number}\]', lines[2])
  seeds = next(line for line in lines[2:7] if line.startswith('small'))
  assert re.fullmatch(rf'small: Ceiling .* \(3 seeds\) +{number} ± {number} +{number} ± {number}', seeds)
  assert sum(line.startswith('Popularity ') for line in lines) == 2
  assert lines[7] == '[low, high]: 95% interval of the mean, 1,000 resamples of the users; ±: standard deviation over seeds'
  assert lines[8:10] == ['', 'ndcg@10, difference to the best, large']
  assert lines[10].split() == ['difference', 'p']
  differences = lines[11:15]
  assert all(re.search(rf'  [-+]{number} \[[-+]{number}, [-+]{number}\]  {number}  (holds|unclear)$', line)
             for line in differences)
  assert all(line.endswith('holds') for line in differences)
  assert lines[15:] == ['p: two-sided, over the same users, given these seeds, corrected by Holm for 10 pairs: all of them, '
                        'as the data pick the best']


def test_the_table_of_one_method_has_no_differences(runs):
  lines = table(compare([f'{runs["weak"]}:popularity'])).splitlines()
  assert len(lines) == 4 and lines[-1] == '[low, high]: 95% interval of the mean, 10,000 resamples of the users'


def test_the_table_repeats_the_caution_of_a_protocol(runs):
  found = compare([f'{runs["weak"]}:popularity'])
  found['protocol']['caution'] = 'of little use'
  assert table(found).splitlines()[-1] == 'caution: of little use'


def test_the_table_against_a_baseline(runs):
  lines = table(compare([runs['weak']], baseline='popularity')).splitlines()
  assert 'ndcg@10, difference to Popularity' in lines
  assert any(line.endswith('unclear') for line in lines)
  assert lines[-1] == 'p: two-sided, over the same users, corrected by Holm for 2 pairs'


def test_two_protocols_or_data_sets_are_refused(runs, tmp_path):
  validation = run_of(tmp_path / 'validation', split='validation')
  refused(lambda: compare([runs['b'], validation]), runs['b'], validation, 'protocols differ', "split: 'test', 'validation'")
  refused(lambda: compare([f'x={runs["b"]}', f'x={validation}']), 'protocols differ')
  other = run_of(tmp_path / 'other', histories=store(seed=1))
  refused(lambda: compare([runs['b'], runs['a1'], other]), runs['b'], other, 'data sets differ')


def test_other_bad_input(runs, tmp_path):
  refused(lambda: compare([]), 'no evaluation folder')
  refused(lambda: compare([str(tmp_path / 'none')]), 'none: no such folder')
  refused(lambda: compare([f'{runs["b"]}:calrec']), "no method 'calrec'", 'popularity')
  refused(lambda: compare([runs['b']], metric='ndcg@7'), "'ndcg@7'", 'ndcg@10')
  refused(lambda: compare([runs['b']], metrics=['mrr', 'auc']), "'auc'", 'mrr')
  refused(lambda: compare([runs['b']], baseline='calrec'), "baseline 'calrec'", 'popularity', 'ceiling')
  refused(lambda: compare([runs['b']], resamples=239), 'resamples = 239', '6 differences', 'at least 240')
  refused(lambda: compare([f'{runs["b"]}:ceiling'], resamples=0), 'resamples = 0')
  refused(lambda: compare([runs['b']], seed=-1), 'seed = -1')
  refused(lambda: compare([f'x={runs["b"]}', f'x={runs["b"]}/']), 'already under this name')
  refused(lambda: compare([f'x={runs["b"]}:ceiling', f'x={runs["a1"]}:popularity']), 'x: names two methods', 'popularity')


def test_the_fewest_resamples_allowed_can_show_a_difference(runs):
  found = compare([f'{runs["b"]}:ceiling', f'{runs["b"]}:popularity'], resamples=40)
  assert all(each['holds'] for each in found['differences'])


def test_a_broken_folder_is_named(runs, tmp_path):
  broken = run_of(tmp_path / 'broken')
  os.remove(f'{broken}/rankings-popularity.jsonl.gz')
  refused(lambda: compare([runs['b'], broken]), 'rankings-popularity.jsonl.gz', 'no such file')
  assert read_result(broken, ['last_item']).methods.keys() == {'last_item'}
