"""The evaluation as a whole: by hand on three users, honest towards the targets, whole or not at all."""

import dataclasses
import json
import re

import numpy as np
import pytest

from calrec_jax.data.histories import load
from calrec_jax.errors import UserError
from calrec_jax.evaluation.evaluate import evaluate, table
from calrec_jax.evaluation.rankings import read_rankings
from calrec_jax.ranking.bm25 import Bm25Options
from calrec_jax.text.templates import ItemTemplate

TITLE_ONLY = ItemTemplate(fields=('title',))
GENERATIONS = [  # test targets: ann h2 (Steel Hose), bob h1 (Garden Hose), cat t2 (Duct Tape, as t1)
  {'user_id': 'cat', 'texts': ['Title: Duct Tape.'], 'logprobs': [-0.1], 'finished': [True]},
  {'user_id': 'ann', 'texts': ['Title: Strong Glue.', 'Title: Steel Hose.'], 'logprobs': [-1, -2],
   'finished': [True, True]},
  {'user_id': 'bob', 'texts': ['Title: Garden', ''], 'logprobs': [-1, -5], 'finished': [False, True]},
]


@pytest.fixture
def run(shop, write_lines, tmp_path):
  """Evaluates the shop with the generations above; keyword arguments replace or add to it."""
  def run(lines=GENERATIONS, **changes):
    defaults = {'histories': shop, 'template': TITLE_ONLY, 'out': tmp_path / 'out', 'generations': write_lines(lines)}
    return evaluate(**{**defaults, **changes})
  return run


def test_three_users_by_hand(run, tmp_path):
  result = run()
  places = {line['user_id']: (line['target'], line['better'], line['tied'])
            for line in read_rankings(tmp_path / 'out/rankings-calrec.jsonl.gz')}
  assert places == {'ann': ('h2', 1, 0), 'bob': ('h1', 0, 0), 'cat': ('t2', 0, 1)}
  assert result['methods']['calrec']['recall@1'] == pytest.approx((0 + 1 + 1 / 2) / 3)
  assert result['methods']['calrec']['mrr'] == pytest.approx((1 / 2 + 1 + 3 / 4) / 3)
  # Last visible items g1, t1, t1 are no target: each target ties with the four other items that score 0.
  assert result['methods']['last_item']['recall@1'] == 0
  assert result['methods']['last_item']['mrr'] == pytest.approx(sum(1 / rank for rank in range(2, 7)) / 5)
  assert result['methods']['transitions']['recall@1'] == 0  # g1 is followed by h1 twice, by h2 once
  assert result['methods']['popularity']['recall@5'] == pytest.approx((1 + 1 + 1 / 2) / 3)


def test_metrics_json_is_what_the_call_returns_and_promises(run, shop, tmp_path):
  result = run()
  assert result.pop('examples') == (tmp_path / 'out/examples.txt').read_text()
  assert json.loads((tmp_path / 'out/metrics.json').read_text()) == result
  assert (result['users'], result['items'], result['too_short_users']) == (3, 6, 0)
  assert list(result['methods']) == ['calrec', 'popularity', 'last_item', 'transitions']
  assert {'recall@1', 'recall@10', 'ndcg@10', 'mrr'} <= result['methods']['calrec'].keys()
  assert result['protocol']['name'] == 'leave_one_out_full' and result['protocol']['hash']
  assert result['data'] == {'name': 'shop', 'fingerprint': shop.fingerprint}
  assert result['duplicate_texts'] == {'texts': 1, 'items': 2, 'targets': 1}
  assert result['generations'] == {'users': 3, 'texts': 5, 'unfinished': 1 / 5, 'empty': 1 / 5, 'exact_match': 3 / 5}
  assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
    'examples.txt', 'metrics.json', *(f'rankings-{name}.jsonl.gz' for name in sorted(result['methods']))]


def test_each_rankings_file_tells_the_metrics(run, tmp_path):
  result = run(oracle=lambda context, item_ids: np.arange(6) / 15)
  for name, metrics in result['methods'].items():
    lines = list(read_rankings(tmp_path / f'out/rankings-{name}.jsonl.gz'))
    assert [line['user_id'] for line in lines] == ['ann', 'bob', 'cat']
    assert all(len(line['top']) == 6 for line in lines)
    ranks = [range(line['better'] + 1, line['better'] + line['tied'] + 2) for line in lines]
    assert metrics['mrr'] == pytest.approx(np.mean([np.mean([1 / rank for rank in possible]) for possible in ranks]))
    for line in lines:
      score_of = {entry['item_id']: entry['score'] for entry in line['top']}
      assert line['better'] == sum(score > score_of[line['target']] for score in score_of.values())
      assert line['tied'] == list(score_of.values()).count(score_of[line['target']]) - 1


@pytest.mark.parametrize(('split', 'contexts', 'targets'), [
  ('test', ['g1 h1 g1', 'g1 h1 h2 t1', 'g2 g1 h2 t1'], ['h2', 'h1', 't2']),
  ('validation', ['g1 h1', 'g1 h1 h2', 'g2 g1 h2'], ['g1', 't1', 't1']),
])
def test_the_oracle_sees_the_context_alone_and_is_the_ceiling(run, tmp_path, split, contexts, targets):
  seen = []

  def oracle(context, item_ids):
    target = targets[contexts.index(' '.join(context))]
    seen.append(' '.join(context))
    return np.array([float(item_id == target) for item_id in item_ids])

  result = run(split=split, oracle=oracle)
  assert seen == contexts
  assert set(result['methods']['ceiling'].values()) == {1}
  lines = read_rankings(tmp_path / 'out/rankings-ceiling.jsonl.gz')
  assert [line['target'] for line in lines] == targets


def test_the_same_input_gives_the_same_bytes(run, tmp_path):
  for name in ('one', 'two'):
    run(out=tmp_path / name)
  files = sorted(path.name for path in (tmp_path / 'one').iterdir())
  assert all((tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes() for name in files)


def test_items_with_one_text_are_tied_whatever_is_generated(run, tmp_path):
  texts = ['Title: Duct Tape.', 'Tape', 'Title: Steel Tape. Hose', 'nothing']
  run([{**line, 'texts': texts, 'logprobs': [-1, -2, -3, -4], 'finished': None} for line in GENERATIONS])
  for line in read_rankings(tmp_path / 'out/rankings-calrec.jsonl.gz'):
    score_of = {entry['item_id']: entry['score'] for entry in line['top']}
    assert score_of['t1'] == score_of['t2']


def test_intervals_lists_and_slices_are_of_the_same_users(run):
  result = run()
  for method, means in result['methods'].items():
    assert all(low - 1e-9 <= means[metric] <= high + 1e-9 for metric, (low, high) in result['intervals'][method].items())
    for groups in result['slices'].values():
      assert sum(group['users'] for group in groups.values()) == 3
      total = sum(group['users'] * group['methods'][method]['ndcg@10'] for group in groups.values())
      assert total / 3 == pytest.approx(means['ndcg@10'])
    assert result['lists'][method]['coverage@10'] == 1  # all six items fit into a list of ten


def test_a_filter_of_seen_items_moves_only_what_is_ranked(run, tmp_path):
  run(seen_items='filtered')
  ann, bob, _ = read_rankings(tmp_path / 'out/rankings-last_item.jsonl.gz')
  assert {entry['item_id'] for entry in ann['top']} == {'g2', 'h2', 't1', 't2'}
  assert {entry['item_id'] for entry in bob['top']} == {'g2', 't2'}  # h1 was bought before, and is the target: missed
  assert (ann['better'], ann['tied']) == (0, 3) and (bob['better'], bob['tied']) == (5, 0)


def test_options_reach_the_ranking(run, tmp_path):
  lines = [{**line, 'texts': ['Title: glue.', 'HOSE garden garden steel'], 'logprobs': [-1, -900], 'finished': None}
           for line in GENERATIONS]
  base = run(lines, out=tmp_path / 'base')
  other = run(lines, out=tmp_path / 'other', bm25=Bm25Options(method='atire', lower=False), epsilon=0.0)
  assert other['ranking']['bm25']['method'] == 'atire' and other['ranking']['epsilon'] == 0
  assert base['methods']['calrec'] != other['methods']['calrec']
  assert base['methods']['popularity'] == other['methods']['popularity']


def test_a_user_without_any_text_has_all_items_tied(run, tmp_path):
  run([{**line, 'texts': [], 'logprobs': [], 'finished': []} for line in GENERATIONS])
  lines = read_rankings(tmp_path / 'out/rankings-calrec.jsonl.gz')
  assert all((line['better'], line['tied']) == (0, 5) for line in lines)


def test_without_generations_there_are_baselines_only(run, tmp_path):
  result = run(generations=None)
  assert list(result['methods']) == ['popularity', 'last_item', 'transitions']
  assert not {'generations', 'examples'} & result.keys()
  assert not (tmp_path / 'out/examples.txt').exists()


def test_fewer_users_are_the_first_ones_and_another_protocol(run, tmp_path):
  everyone, two = run(out=tmp_path / 'all'), run(GENERATIONS[1:], max_users=2)
  assert two['users'] == 2 and two['generations']['users'] == 2
  assert two['protocol']['hash'] != everyone['protocol']['hash']
  assert [line['user_id'] for line in read_rankings(tmp_path / 'out/rankings-calrec.jsonl.gz')] == ['ann', 'bob']


def test_the_table_has_calrec_first_and_the_ceiling_last(run):
  lines = table(run(oracle=lambda context, item_ids: np.ones(6))).splitlines()
  assert 'shop, test split: 3 users, 6 items' in lines[0]
  assert lines[1].split() == ['Recall@1', 'Recall@10', 'NDCG@10', 'MRR']
  assert [line[:6] for line in lines[2:]] == ['CALRec', 'Item-t', 'Last i', 'Popula', 'Ceilin']
  assert [cell.split()[0] for cell in re.findall(r'\d\.\d{4} \[[^]]*\]', lines[2])][:2] == ['0.5000', '1.0000']
  assert len({len(line) for line in lines[2:]}) == 1


BAD_GENERATIONS = {
  'no texts for 2 of the 3 users': GENERATIONS[:1],
  "1 of 4 users are not in the data set shop (such as 'dan')": [*GENERATIONS, {**GENERATIONS[0], 'user_id': 'dan'}],
  'line 2: not JSON': [GENERATIONS[0], '{"user_id"', *GENERATIONS[1:]],
  'line 4': [*GENERATIONS, GENERATIONS[0]],
}


@pytest.mark.parametrize(('told', 'lines'), BAD_GENERATIONS.items())
def test_generations_that_do_not_fit(run, tmp_path, told, lines):
  with pytest.raises(UserError, match=re.escape(told)):
    run(lines)
  assert not (tmp_path / 'out').exists()


def test_truncated_and_missing_generations(run, write_lines, tmp_path):
  path = write_lines(GENERATIONS, 'cut.jsonl.gz')
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match='truncated'):
    run(generations=path)
  with pytest.raises(UserError, match=r'absent\.jsonl\.gz'):
    run(generations=tmp_path / 'absent.jsonl.gz')


@pytest.mark.parametrize('options', [{'split': 'train'}, {'epsilon': -1.0}, {'max_users': 0}])
def test_options_out_of_range(run, tmp_path, options):
  with pytest.raises(UserError, match=next(iter(options))):
    run(**options)
  assert not (tmp_path / 'out').exists()


def test_a_folder_in_use_is_left_alone(run, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/mine').write_text('kept')
  with pytest.raises(UserError, match='in use'):
    run()
  assert [path.name for path in (tmp_path / 'out').iterdir()] == ['mine']


def test_nothing_is_left_of_a_run_that_fails(run, tmp_path):
  with pytest.raises(ValueError, match='finite scores'):
    run(oracle=lambda context, item_ids: np.full(6, np.nan))
  assert [path.name for path in tmp_path.iterdir()] == ['generations.jsonl.gz']


def test_real_histories_with_the_truth_generated(real_data, write_lines, tmp_path):
  histories = load(real_data / 'histories/scientific2018')
  template = ItemTemplate()
  few = dataclasses.replace(histories, user_ids=histories.user_ids[:200], offsets=histories.offsets[:201],
                            events=histories.events[:histories.offsets[200]])
  truths = [template.item_text(few.items[few.history(user)[-1]]) for user in range(200)]
  path = write_lines({'user_id': user_id, 'texts': [truth], 'logprobs': [-1.0]}
                     for user_id, truth in zip(few.user_ids, truths, strict=True))
  result = evaluate(histories=few, template=template, out=tmp_path / 'out', generations=path)
  assert result['items'] == 4385 and result['generations']['exact_match'] == 1
  for line in read_rankings(tmp_path / 'out/rankings-calrec.jsonl.gz'):
    twins = [entry['item_id'] for entry in line['top'] if entry['score'] == line['top'][0]['score']]
    assert line['better'] == 0 and len(twins) == line['tied'] + 1 and line['target'] in twins
