"""What is a folder of this project, what its records lead to, and how findings are shown."""

import json

import pytest
from audit_shop import changed, shop, store

from calrec_jax.errors import UserError
from calrec_jax.evaluation.audit import folders
from calrec_jax.evaluation.audit.audit import audit
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS, as_result, as_text, finding, item_label


def test_folders_are_told_apart_by_what_lies_in_them(whole_chain):
  kinds = {name: folders.open_folder(getattr(whole_chain, name)).kind for name in vars(whole_chain)}
  assert kinds == {'data': folders.HISTORIES, 'checkpoint': folders.TRAINING, 'infer': folders.INFERENCE,
                   'evaluate': folders.EVALUATION, 'index': folders.INDEX}


def test_what_stands_for_a_checkpoint_is_its_run(whole_chain):
  run = whole_chain.checkpoint
  for path in (run / 'best', run / 'checkpoints/12', run):
    assert folders.open_folder(path).path == run
  assert folders.open_folder(run).data.keys() == {'books', 'games'}
  assert [each.path for each in folders.open_all([run, run / 'checkpoints/12'])] == [run]


def test_records_are_read(whole_chain):
  infer, evaluate = (folders.open_folder(getattr(whole_chain, name)) for name in ('infer', 'evaluate'))
  assert (infer.split, evaluate.split) == ('test', 'test')
  assert infer.links == {'checkpoint': whole_chain.checkpoint} and evaluate.links == {'generations': whole_chain.infer}
  assert infer.data == evaluate.data and evaluate.protocol['name'] == 'leave_one_out_full'


def test_gin_text_is_read_as_gin_writes_it(tmp_path):
  path = tmp_path / 'config.gin'
  path.write_text("# Macros:\nDATA_DIR = \\\n    '/a very/long path'\nLOOP = %LOOP\nINITIAL = None\n"
                  'inputs.data_dir = %DATA_DIR\ntrain.initial_checkpoint = %INITIAL\ntrain.seed = @f()\ntrain.loop = %LOOP\n')
  names = ('inputs.data_dir', 'train.initial_checkpoint', 'train.seed', 'train.loop', 'train.absent')
  assert folders._gin_values(path, names) == {'data_dir': '/a very/long path', 'initial_checkpoint': None}
  assert folders._gin_values(tmp_path / 'absent.gin', names) == {}


def test_relative_links_are_looked_for_above_the_folder(whole_chain, tmp_path, monkeypatch):
  (tmp_path / 'runs/infer').mkdir(parents=True)
  (tmp_path / 'runs/infer/generations.jsonl.gz').write_bytes(b'')
  (tmp_path / 'runs/stage2/checkpoints/3').mkdir(parents=True)
  (tmp_path / 'runs/infer/run.json').write_text(json.dumps({'checkpoint': 'runs/stage2/checkpoints/3'}))
  monkeypatch.chdir('/')
  assert folders.open_folder(tmp_path / 'runs/infer').links == {'checkpoint': tmp_path / 'runs/stage2/checkpoints/3'}
  (tmp_path / 'runs/infer/run.json').write_text(json.dumps({'checkpoint': 'runs/gone'}))
  assert folders.open_folder(tmp_path / 'runs/infer').lost == {'checkpoint': 'runs/gone'}


BROKEN = {'{': 'cannot be read as JSON', '[1]': 'a JSON list, where an object is expected',
          '{"data": {"shop": 3}}': '"data" or "split" is not as',
          '{"data": {}, "report": {"split": "train"}}': '"data" or "split" is not as'}


@pytest.mark.parametrize(('text', 'told'), BROKEN.items())
def test_broken_records_are_told(clean, tmp_path, text, told):
  (tmp_path / 'infer').mkdir()
  (tmp_path / 'infer/generations.jsonl.gz').write_bytes(b'')
  (tmp_path / 'infer/run.json').write_text(text)
  with pytest.raises(UserError, match=f'run.json: {told}'):
    audit(store(clean, tmp_path / 'shop'), [tmp_path / 'infer'])


def test_wrong_folders_are_told(clean, tmp_path):
  data = store(clean, tmp_path / 'shop')
  (tmp_path / 'empty').mkdir()
  for run, told in (('empty', 'empty: not a folder of this project; give'), ('absent', 'absent: no such folder; give')):
    with pytest.raises(UserError, match=told):
      audit(data, [tmp_path / run])
  with pytest.raises(UserError, match='absent: no such folder'):
    audit(tmp_path / 'absent')
  (data / 'sequences.jsonl.gz').write_bytes((data / 'sequences.jsonl.gz').read_bytes()[:-9])
  with pytest.raises(UserError, match='truncated'):
    audit(data)


def test_findings_are_shown_serious_first_with_totals(tmp_path):
  found = [finding('b', NOTE, 'Two.', 2, ['x\x1b[31m', 'y', 'z', 'never shown']), finding('a', SERIOUS, 'One\nline.', 1)]
  result = as_result('data/shop', ['runs/one'], found)
  assert as_text(result).splitlines() == [
      'SERIOUS  a: One line.', 'NOTE  b: Two.', '    x�[31m', '    y', '    z',
      '1 serious finding, 1 note: data/shop and 1 folder.']
  assert json.loads(json.dumps(result)) == result
  assert result['findings'][1] == {
      'check': 'b', 'severity': NOTE, 'message': 'Two.', 'count': 2, 'examples': ['x�[31m', 'y', 'z']}
  assert as_text(as_result('d', [], [])) == '0 serious findings, 0 notes: d and 0 folders.'


def test_a_hostile_title_reaches_no_terminal(tmp_path):
  """A leak whose example has an escape sequence for a title, as data that was not prepared here may."""
  data = shop()
  items = [item | {'title': '\x1b]0;owned\x07\u202etitle'} for item in data.items]
  hostile = changed(data, lambda rows, times: times[0].__setitem__(-1, 0), items=items)
  assert item_label(hostile, 0) == f'{data.item_ids[0]} (�]0;owned��title)'
