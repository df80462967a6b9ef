"""All baselines in one evaluation folder, which reads as one that `calrec evaluate` wrote."""

import json

import pytest
import tiny

from calrec_jax import cli
from calrec_jax.data import histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation import baseline_run
from calrec_jax.evaluation.baselines.sasrec import SasrecOptions
from calrec_jax.evaluation.evaluate import TITLES
from calrec_jax.evaluation.protocols import Protocol
from calrec_jax.evaluation.results import read_result
from calrec_jax.text.templates import ItemTemplate

SMALL = SasrecOptions(dim=8, layers=1, heads=1, max_length=8, max_epochs=2)


def run(data, out, methods=baseline_run.METHODS, **protocol):
  return baseline_run.run_baselines(data, out, protocol=Protocol(**protocol), methods=methods, template=ItemTemplate(),
                                    sasrec_options=SMALL)


def test_all_of_them_and_their_record(tmp_path):
  data = tiny.make_histories('books')
  result = run(data, tmp_path / 'out')
  assert list(result['methods']) == list(baseline_run.METHODS) and set(baseline_run.METHODS) <= TITLES.keys()
  assert result['methods']['transitions']['ndcg@10'] > result['methods']['popularity']['ndcg@10']  # items follow each other
  assert list(read_result(tmp_path / 'out').methods) == list(baseline_run.METHODS)
  record = json.loads((tmp_path / 'out/run.json').read_text())
  assert record['sasrec']['options']['dim'] == 8 and len(record['sasrec']['epochs']) == 2
  assert record['data'] == {'books': data.fingerprint}


def test_the_verb(tmp_path, capsys):
  (tmp_path / 'books').mkdir()
  histories.write(tmp_path / 'books', tiny.make_histories('books'), {})
  arguments = ['baselines', str(tmp_path / 'books'), '--out', str(tmp_path / 'out'), '--methods', 'popularity', 'item_knn']
  assert cli.main([*arguments, '--seen_items', 'filtered', '--split', 'validation', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert list(found['methods']) == ['popularity', 'item_knn'] and found['protocol']['split'] == 'validation'
  assert cli.main(arguments) == 2 and 'in use' in capsys.readouterr().err


@pytest.mark.parametrize(('options', 'told'), [
  ({'methods': ['popularity', 'oracle']}, "'oracle' is no baseline"), ({'name': 'time_split_full'}, 'split by'),
  ({'min_history': 99}, 'nobody to evaluate')])
def test_bad_input_leaves_nothing(tmp_path, options, told):
  with pytest.raises(UserError, match=told):
    run(tiny.make_histories('books'), tmp_path / 'out', **options)
  assert not (tmp_path / 'out').exists()
