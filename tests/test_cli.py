"""The command line: help at once, results on stdout, wrong input in one line with exit code 2 and nothing half-written."""

import errno
import gzip
import io
import json
import pathlib
import subprocess
import sys
import time

import pretrained_models
import pytest
import tiny
import toy_corpus

from calrec_jax import cli, data_verbs, outputs
from calrec_jax.errors import UserError
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.text.templates import ItemTemplate

VERBS = [['download'], ['download', 'amazon'], ['synthesize'], ['prepare'], ['prepare', 'dumps'], ['prepare', 'histories'],
         ['describe'], ['vocabulary'], ['cache'], ['import'], ['train'], ['infer'], ['evaluate'], ['index'], ['recommend'],
         ['score'], ['export'], ['baselines'], ['compare'], ['ablate'], ['audit'], ['report'], ['plan']]
REVIEW = {'reviewerID': 'u', 'asin': 'a', 'unixReviewTime': 1, 'overall': 5.0}


def write_lines(path: pathlib.Path, rows: list) -> pathlib.Path:
  path.write_bytes(gzip.compress('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()))
  return path


def core(n: int = 6) -> list[dict]:
  """Reviews in which n users each bought n items."""
  return [REVIEW | {'reviewerID': f'u{user}', 'asin': f'a{item}', 'unixReviewTime': item}
          for user in range(n) for item in range(n)]


def refused(capsys, arguments: list, *words: str, absent: pathlib.Path | None = None) -> str:
  """Runs a command that must fail: exit code 2, one line that says `words`, and `absent` is not there."""
  capsys.readouterr()
  try:
    code = cli.main([str(argument) for argument in arguments])
  except SystemExit as error:  # argparse
    code = error.code
  out, err = capsys.readouterr()
  lines = [line for line in err.splitlines() if 'error:' in line]
  assert code == 2 and len(lines) == 1 and not out and 'Traceback' not in err, err
  assert err.splitlines()[-1] == lines[0]
  for word in words:
    assert word in lines[0], lines[0]
  if absent is not None:
    assert not absent.exists() and not list(absent.parent.glob(f'.{absent.name}*'))
  return lines[0]


def test_help_is_instant_and_has_examples():
  for verb in VERBS:
    began = time.monotonic()
    done = subprocess.run([sys.executable, '-m', 'calrec_jax.cli', *verb, '--help'], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 3  # a loaded machine; alone it takes a tenth of a second
    assert 'usage: calrec' in done.stdout
    assert verb in (['download'], ['prepare']) or f'example:\n  calrec {" ".join(verb)}' in done.stdout


def test_help_imports_nothing_heavy():
  code = ('import sys\nfrom calrec_jax import cli\ntry:\n  cli.main(["train", "--help"])\nexcept SystemExit:\n  pass\n'
          'sys.exit(any(m in sys.modules for m in ("jax", "tensorflow", "numpy", "gin")))')
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, check=False).returncode == 0


def test_json_has_stdout_to_itself(tmp_path, capfd):
  small = ['--users', '60', '--items', '30', '--categories', '1', '--json']
  assert cli.main(['synthesize', '--out', str(tmp_path / 's'), *small]) == 0
  json.loads(capfd.readouterr().out)
  reviews = next((tmp_path / 's').glob('*_5.json.gz'))
  assert cli.main(['prepare', 'dumps', '--reviews', str(reviews), '--name', 'n', '--out', str(tmp_path / 'n'), '--json']) == 0
  assert json.loads(capfd.readouterr().out)['statistics']['users'] > 0


@pytest.mark.parametrize('arguments, words', [
    (['train', '--nonsense'], ['--nonsense', '--help']),
    (['fly'], ['fly']),
    (['synthesize', '--out', 'x', '--users', '-1'], ['--users', 'above 0']),
    (['train'], ['--gin_file']),
    (['synthesize', '--out', 'x', '--gin.A=1'], ['takes no gin bindings']),
])
def test_wrong_words(arguments, words, capsys):
  refused(capsys, arguments, *words)


def test_bad_dumps(tmp_path, capsys):
  out = tmp_path / 'out'
  prepare = lambda path, *more: ['prepare', 'dumps', '--reviews', path, '--name', 'n', '--out', out, *more]
  refused(capsys, prepare(tmp_path / 'none.json.gz'), 'none.json.gz', absent=out)
  whole = write_lines(tmp_path / 'whole.json.gz', core())
  cut = tmp_path / 'cut.json.gz'
  cut.write_bytes(whole.read_bytes()[:-20])
  refused(capsys, prepare(cut), 'cut.json.gz', absent=out)
  broken = write_lines(tmp_path / 'broken.json.gz', [*core()[:3], '{"reviewerID": ', *core()[3:]])
  refused(capsys, prepare(broken), 'broken.json.gz', 'line 4', '--max_bad_lines', absent=out)
  assert cli.main([str(a) for a in prepare(broken, '--max_bad_lines', '1')]) == 0
  refused(capsys, prepare(whole), str(out), 'in use')
  few = write_lines(tmp_path / 'few.json.gz', core(3))
  refused(capsys, ['prepare', 'dumps', '--reviews', few, '--name', 'n', '--out', tmp_path / 'few'], '5',
          absent=tmp_path / 'few')


def test_bad_sequences(tmp_path, capsys):
  items = write_lines(tmp_path / 'items.jsonl.gz', [{'item_id': 'a', 'title': 't', 'category': '', 'brand': '', 'price': ''}])
  sequences = write_lines(tmp_path / 'sequences.jsonl.gz', [{'user_id': 'u', 'item_ids': ['a', 'ghost', 'a']}])
  prepare = ['prepare', 'histories', '--sequences', sequences, '--items', items, '--name', 'n', '--out', tmp_path / 'out']
  refused(capsys, prepare, 'ghost', absent=tmp_path / 'out')


def test_bad_events(tmp_path, capsys):
  (tmp_path / 'events.csv').write_text('user,item,when\nu,a,1600000000\n')
  (tmp_path / 'items.csv').write_text('item_id,title\nb,B\n')
  out = tmp_path / 'out'
  prepare = ['prepare', 'histories', '--events', tmp_path / 'events.csv', '--items', tmp_path / 'items.csv', '--name', 'n',
             '--out', out, '--min_length', '1']
  refused(capsys, prepare, 'events.csv', '--time_column', 'user, item, when', absent=out)
  refused(capsys, [*prepare, '--time_column', 'when'], 'items.csv', '1 of the 1 items with events', "'a'", absent=out)
  refused(capsys, [*prepare, '--sequences', 'x'], '--sequences', '--events')
  assert cli.main([str(word) for word in [*prepare, '--time_column', 'when', '--unknown_items', 'keep', '--json']]) == 0
  assert json.loads(capsys.readouterr().out)['metadata']['items_without'] == 1


@pytest.mark.parametrize('changes, words', [
    (['--data', 'nowhere'], ['nowhere', 'is not there']), (['--vocabulary', 'nowhere.json'], ['nowhere.json']),
    (['--targets', 'first'], ["'first'", "'last' or 'all'"]), (["--beam=--runner='"], ['--beam', 'quote']),
    (['--unknown', 'ask'], ["'write' or 'skip'"])])
def test_bad_caches(changes, words, tiny_store, tmp_path, capsys):
  store = ['--data', tiny_store / 'data/games', '--vocabulary', tiny_store / 'vocabulary.json']
  refused(capsys, ['cache', *store, '--out', tmp_path / 'out', *changes], *words, absent=tmp_path / 'out')


@pytest.mark.parametrize('changes, words', [
    (['--gin.trian.seed=1'], ["'trian'", "'train'"]),
    (['--gin.train.sed=1'], ['sed']),
    (['--gin.TRIAN_STEPS=5'], ['TRIAN_STEPS', "'TRAIN_STEPS'", 'nothing reads it']),
    (['--gin.MODEL_DIR=runs/x'], ['MODEL_DIR', 'quotes']),
    (['--gin.BATCH_SIZE=[8'], ['BATCH_SIZE']),
    (['--gin.BATCH_SIZE'], ['NAME=VALUE']),
    (['--gin_file=gin/runs/nowhere.gin'], ['gin/runs/nowhere.gin']),
    (['--gin.BATCH_SIZE=6'], ['BATCH_SIZE = 6', 'multiple of 8']),
    (['--gin.mesh.model=3'], ['does not divide 8 devices']),
    (["--gin.MIXTURE_OR_TASK_NAME='nobody'"], ['nobody', 'books']),
    (["--gin.DATA_DIR='/nowhere'"], ['/nowhere']),
    (["--gin.VOCABULARY='/nowhere.json'"], ['/nowhere.json']),
    (["--gin.INITIAL_CHECKPOINT_PATH='/nowhere'"], ['/nowhere', 'no checkpoint']),
    (["--gin.objective.direction='up'"], ['up', 'symmetric']),
    (["--gin.rows.targets='first'"], ["'last' or 'all'"]),
    (["--gin.text.unknown='ask'"], ["'write' or 'skip'"]),
    (["--gin.TASK_FEATURE_LENGTHS={'inputs': 1, 'targets': 8}"], ['TASK_FEATURE_LENGTHS']),
])
def test_bad_runs(changes, words, tiny_store, tmp_path, capsys):
  refused(capsys, [*tiny.gin_arguments(tiny_store, 'stage1', tmp_path / 'run'), *changes], *words, absent=tmp_path / 'run')


def test_a_pretrained_model_goes_in_is_scored_and_goes_out(tmp_path, capsys):
  pretrained_models.save(pretrained_models.make('llama'), tmp_path / 'hf')
  assert cli.main(['import', '--from', str(tmp_path / 'hf'), '--out', str(tmp_path / 'model')]) == 0
  out = capsys.readouterr().out
  assert 'hf: llama, 14,952 parameters, 3 layers, licence not stated.' in out
  assert 'Vocabulary: 37 tokens for 40 rows; a text begins with nothing and ends with </s>.' in out
  assert cli.main(['score', '--checkpoint', str(tmp_path / 'model'), '--text', 'ABA', '--json']) == 0
  report = json.loads(capsys.readouterr().out)
  assert report.keys() == {'token_ids', 'tokens', 'logprobs'} and report['token_ids'] == [2, 3, 2]
  assert report['logprobs'][0] is None and len(report['logprobs']) == 3
  assert cli.main(['score', '--checkpoint', str(tmp_path / 'model'), '--text', 'ABA']) == 0
  assert f"{sum(report['logprobs'][1:]):.4f} nats" in capsys.readouterr().out
  assert cli.main(['export', '--checkpoint', str(tmp_path / 'model'), '--out', str(tmp_path / 'out'), '--json']) == 0
  assert json.loads(capsys.readouterr().out)['parameters'] == 14_952


def test_pretrained_models_that_are_not_whole(tmp_path, capsys):
  folder, out = tmp_path / 'hf', tmp_path / 'out'
  refused(capsys, ['import', '--from', folder, '--out', out], str(folder), 'cannot be read', absent=out)
  pretrained_models.save(pretrained_models.make('llama'), folder)
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  refused(capsys, ['import', '--from', folder, '--out', out], 'pytorch_model.bin', 'pickle', 'safetensors', absent=out)
  refused(capsys, ['import', '--from', folder, '--out', out, '--dtype', 'int8'], '--dtype', absent=out)
  refused(capsys, ['export', '--checkpoint', folder, '--out', out], 'no checkpoint', absent=out)
  refused(capsys, ['score', '--checkpoint', folder, '--text', 'A'], 'no checkpoint')


@pytest.fixture(scope='module')
def index(tiny_store, trained_run, tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp('cli') / 'index'
  data, run = str(tiny_store / 'data/games'), str(trained_run)
  assert cli.main(['index', '--catalogue', data, '--checkpoint', run, '--out', str(out)]) == 0
  return out


@pytest.fixture
def recommend(trained_run, index):
  """The words of `calrec recommend`; `dense`, which compiles least."""
  return lambda *more: ['recommend', '--checkpoint', str(trained_run), '--catalogue', str(index), '--ranker', 'dense', *more]


def test_recommendations_are_a_table_or_json(recommend, tiny_store, capsys):
  assert cli.main(recommend('--history', 'games-0,games-1', '--top', '3', '--exclude_seen')) == 0
  head, *rows = capsys.readouterr().out.splitlines()
  assert head.split() == ['item', 'score', 'title', 'reason'] and len(rows) == 3 and all('cosine' in row for row in rows)
  assert cli.main(recommend('--history', 'games-0,games-1', '--top', '3', '--exclude_seen', '--json')) == 0
  found = json.loads(capsys.readouterr().out)
  assert [row['item_id'] for row in found] == [row.split()[0] for row in rows]
  assert found[0].keys() == {'item_id', 'title', 'score', 'reason'} and found[0]['title'] in rows[0]
  again = recommend('--history', 'ghost,games-0,games-1', '--skip_unknown', '--top', '3', '--exclude_seen', '--json')
  again[again.index('--catalogue') + 1] = str(tiny_store / 'data/games')  # a catalogue is indexed on the spot
  assert cli.main(again) == 0
  assert json.loads(capsys.readouterr().out) == found


def answers(monkeypatch, capsys, arguments: list[str], text: str | bytes) -> tuple[int, list[dict], str]:
  """(exit code, answers, stderr) of a command that reads this."""
  capsys.readouterr()
  content = text if isinstance(text, bytes) else text.encode()
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content), encoding='utf-8'))
  code = cli.main(arguments)
  out, err = capsys.readouterr()
  return code, [json.loads(line) for line in out.splitlines()], err


def test_lines_are_answered_one_by_one(recommend, monkeypatch, capsys):
  good = ['{"history": ["games-0", "games-1"], "user_id": "ünï"}', '{"history": ["games-3"]}']
  bad = ['{"history": ["games-0", "ghost"]}', '{"history": []}']
  arguments = recommend('--history', '-', '--top', '2')
  code, found, _ = answers(monkeypatch, capsys, [*arguments, '--json'], '\n'.join([good[0], '', bad[0], good[1], bad[1]]))
  assert code == 0 and [row['user_id'] for row in found] == ['ünï', None, None, None]
  assert "no item 'ghost'" in found[1]['error'] and 'is empty' in found[3]['error']
  assert [len(found[number]['recommendations']) for number in (0, 2)] == [2, 2]
  cli.main(recommend('--history', 'games-0,games-1', '--top', '2', '--json'))
  assert json.loads(capsys.readouterr().out) == found[0]['recommendations']
  # Without --json the answers are the same.
  assert answers(monkeypatch, capsys, arguments, good[0])[1] == found[:1]
  assert answers(monkeypatch, capsys, arguments, '')[:2] == (0, [])


@pytest.mark.parametrize('line', [
    '{"history": ', '[1]', '{}', '{"history": "games-0"}', '{"history": [1]}', b'{"history": ["\xff"]}',
    '{"history": ["games-0"], "user_id": 7}', '{"history": ["\\ud800"], "user_id": "\\udfff"}'])
def test_a_line_that_is_no_history_is_named(recommend, monkeypatch, capsys, line):
  content = b'{"history": ["games-0"]}\n\n' + (line if isinstance(line, bytes) else line.encode())
  code, found, err = answers(monkeypatch, capsys, recommend('--history', '-'), content)
  assert code == 2 and len(found) == 1 and 'error: line 3 of the input: expected {"history"' in err


@pytest.mark.parametrize(('more', 'words'), [
    (['--history', 'games-0,ghost'], ["no item 'ghost'", '--skip_unknown']), (['--history', ''], ['is empty']),
    (['--history', 'games-0', '--top', '17'], ['top = 17', '16 items']), (['--history', 'games-0', '--top', '0'], ['--top']),
    (['--history', '-', '--top', '17'], ['top = 17']), (['--history', '-', '--category', 'blue'], ["category = 'blue'"]),
    (['--history', 'games-0', '--category', 'red', '--in_stock', 'STOCK'], ['filters leave no item']),
    (['--history', '-', '--in_stock', 'STOCK', '--category', 'red'], ['filters leave no item']),
    (['--history', 'games-0', '--in_stock', 'nowhere.txt'], ['nowhere.txt', 'an item id a line']),
    (['--history', 'games-0', '--ranker', 'popular'], ['popular', 'constrained']),
    (['--history', '-', '--ranker', 'fused', '--fusion', 'nowhere'], ['nowhere', 'no weights of a fusion']),
    (['--history', 'games-0', '--checkpoint', 'nowhere'], ['nowhere', 'no checkpoint']),
    (['--history', 'games-0', '--catalogue', 'nowhere'], ['nowhere', 'no such file'])])
def test_bad_recommendations(recommend, tmp_path, capsys, monkeypatch, more, words):
  (tmp_path / 'stock.txt').write_text('games-0\r\n\ngames-2\n')  # neither is red
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'{"history": ["games-0"]}\n')))
  refused(capsys, recommend(*(str(tmp_path / 'stock.txt') if word == 'STOCK' else word for word in more)), *words)


def test_bad_indexes(tiny_store, trained_run, index, tmp_path, capsys):
  out = tmp_path / 'out'
  make = lambda catalogue, *more: ['index', '--catalogue', catalogue, '--checkpoint', trained_run, '--out', out, *more]
  refused(capsys, make(tmp_path / 'nowhere'), 'nowhere', 'no such file', absent=out)
  refused(capsys, make(write_lines(tmp_path / 'empty.jsonl.gz', [])), 'empty.jsonl.gz', 'lists no item', absent=out)
  broken = write_lines(tmp_path / 'broken.jsonl.gz', [{'item_id': 'a', 'title': 't'}, '{"item_id"'])
  refused(capsys, make(broken), 'broken.jsonl.gz', 'line 2', absent=out)
  refused(capsys, make(tiny_store / 'data/games', '--old', tmp_path), 'not a whole index', absent=out)
  refused(capsys, make(tiny_store / 'data/games', '--checkpoint', tmp_path), 'no checkpoint', absent=out)
  other = trained_run / 'checkpoints/12'
  refused(capsys, make(tiny_store / 'data/games', '--old', index, '--checkpoint', other), 'another weights', absent=out)
  refused(capsys, ['recommend', '--catalogue', index, '--checkpoint', other, '--history', 'games-0'], 'another weights')
  refused(capsys, [*make(tiny_store / 'data/games'), '--out', index], 'in use')
  assert cli.main([str(word) for word in [*make(tiny_store / 'data/books', '--old', index), '--json']]) == 0
  assert json.loads(capsys.readouterr().out)['items'] == 16


def test_missing_macros_are_named(capsys):
  refused(capsys, ['train', '--gin_file=gin/runs/stage1.gin'], 'MODEL_DIR', 'DATA_DIR', 'TRAIN_STEPS', 'required')


def test_misfits(tiny_store, tmp_path, capsys):
  """Checkpoints of another shape or vocabulary, and folders that are in use."""
  first = tiny.gin_arguments(tiny_store, 'stage1', tmp_path / 'one')
  assert cli.main(first) == 0
  second = [*tiny.gin_arguments(tiny_store, 'stage1', tmp_path / 'two'), f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path / 'one'}'"]
  refused(capsys, [*second, '--gin.decoder.ff_dim=32'], 'ff_dim is 64 there, 32 here', absent=tmp_path / 'two')
  cli.main(['vocabulary', '--data', str(tiny_store / 'data/books'), '--size', '300', '--out', str(tmp_path / 'other.json')])
  refused(capsys, [*second, f"--gin.VOCABULARY='{tmp_path / 'other.json'}'"], 'another vocabulary', absent=tmp_path / 'two')
  refused(capsys, [*second, "--gin.text.fields=('title',)"], 'text.fields', absent=tmp_path / 'two')
  refused(capsys, [*first, "--gin.MIXTURE_OR_TASK_NAME='books'"], 'other data')
  foreign = tmp_path / 'foreign'
  foreign.mkdir()
  (foreign / 'thesis.tex').write_text('mine')
  refused(capsys, tiny.gin_arguments(tiny_store, 'stage1', foreign), 'in use')
  assert [path.name for path in foreign.iterdir()] == ['thesis.tex']
  data = tiny.gin([f"DATA_DIR='{tiny_store / 'data'}'", "MIXTURE_OR_TASK_NAME='books'", 'INFER_OUTPUT_DIR=None'])
  refused(capsys, ['evaluate', '--gin_file=gin/runs/evaluate.gin', *data, f"--gin.EVAL_OUTPUT_DIR='{foreign}'"], 'in use')
  infer = ['infer', '--gin_file=gin/runs/infer.gin', *data, f"--gin.INFER_OUTPUT_DIR='{tmp_path / 'infer'}'",
           f"--gin.CHECKPOINT_PATH='{tmp_path / 'one'}'"]
  refused(capsys, [*infer, "--gin.MIXTURE_OR_TASK_NAME='nobody'"], 'nobody', 'books', absent=tmp_path / 'infer')
  damaged = tmp_path / 'one/checkpoints/2/params'
  for file in damaged.rglob('*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  refused(capsys, infer, 'cannot be read', 'step')


def test_gin_files_are_found_from_any_folder(tiny_store, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  refused(capsys, ['train', '--gin_file=gin/runs/stage2.gin'], 'INITIAL_CHECKPOINT_PATH')
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine/own.gin').write_text("include 'gin/runs/stage1.gin'\nTRAIN_STEPS = 3\n")
  line = refused(capsys, ['train', '--gin_file=own.gin', '--gin_search_paths=mine'], 'MODEL_DIR')
  assert 'TRAIN_STEPS' not in line


def test_a_bug_keeps_its_traceback(monkeypatch):
  def bug(options):
    raise ZeroDivisionError
  monkeypatch.setattr(data_verbs, '_synthesize', bug)
  with pytest.raises(ZeroDivisionError):
    cli.main(['synthesize', '--out', 'x'])


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, capsys):
  from calrec_jax.data import json_lines
  def full(path, rows, **_):
    path.write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device', str(path))
  monkeypatch.setattr(json_lines, 'write', full)
  refused(capsys, ['synthesize', '--out', tmp_path / 'out', '--users', '5'], 'no space is left', absent=tmp_path / 'out')


def test_outputs_appear_whole_or_not_at_all(tmp_path):
  with pytest.raises(ZeroDivisionError), outputs.new_folder(tmp_path / 'deep/out') as scratch:
    (scratch / 'half').write_text('half')
    raise ZeroDivisionError
  assert not list((tmp_path / 'deep').iterdir())
  with outputs.new_folder(tmp_path / 'deep/out') as scratch:
    (scratch / 'file').write_text('whole')
    assert not (tmp_path / 'deep/out').exists()
  assert (tmp_path / 'deep/out/file').read_text() == 'whole'
  with pytest.raises(UserError, match='in use'):
    outputs.check_unused(tmp_path / 'deep/out')
  (tmp_path / 'kept').write_text('old')
  with pytest.raises(ZeroDivisionError), outputs.new_file(tmp_path / 'kept') as scratch:
    scratch.write_text('new')
    raise ZeroDivisionError
  assert (tmp_path / 'kept').read_text() == 'old' and len(list(tmp_path.iterdir())) == 2
  (tmp_path / 'blocked').write_text('a file')
  with pytest.raises(UserError, match='cannot be written'), outputs.new_folder(tmp_path / 'blocked/out'):
    pass


def test_an_evaluation_beside_others_is_their_comparison(tmp_path, tiny_store, capsys):
  """One table over a new run and older ones, the same that `calrec compare` prints of them."""
  command = ['evaluate', '--gin_file=gin/runs/evaluate.gin', f'--gin.DATA_DIR="{tiny_store}/data"',
             '--gin.INFER_OUTPUT_DIR=None', '--gin.MIXTURE_OR_TASK_NAME="games"']
  assert cli.main([*command, f'--gin.EVAL_OUTPUT_DIR="{tmp_path}/old"']) == 0
  capsys.readouterr()
  runs = [f'{tmp_path}/new', f'old={tmp_path}/old']
  assert cli.main([*command, f'--gin.EVAL_OUTPUT_DIR="{tmp_path}/new"', '--beside', runs[1]]) == 0
  shown = capsys.readouterr().out
  assert cli.main(['compare', *runs]) == 0
  compared = capsys.readouterr().out
  assert '95% interval' in compared and shown.endswith(compared)
  assert cli.main([*command, f'--gin.EVAL_OUTPUT_DIR="{tmp_path}/third"', '--json', '--beside', runs[1]]) == 0
  assert json.loads(capsys.readouterr().out)['beside']['metric'] == 'ndcg@10'
  refused(capsys, [*command, f'--gin.EVAL_OUTPUT_DIR="{tmp_path}/fourth"', '--beside', tmp_path / 'none'], 'none',
          'no such folder')
  assert not (tmp_path / 'fourth').exists()


def test_compare_is_a_table_or_json_or_one_line(tmp_path, capsys):
  histories = toy_corpus.toy_source([[item] for item in range(6)], [[0, 1, 2, 3], [1, 2, 3, 4], [2, 4, 5, 1]]).histories
  evaluate(histories=histories, template=ItemTemplate(fields=('title',)), out=tmp_path / 'run')
  assert cli.main(['compare', str(tmp_path / 'run')]) == 0
  assert 'difference to the best' in capsys.readouterr().out
  assert cli.main(['compare', str(tmp_path / 'run'), '--baseline', 'popularity', '--metrics', 'mrr', '--json']) == 0
  assert json.loads(capsys.readouterr().out)['baseline'] == 'popularity'
  refused(capsys, ['compare', tmp_path / 'none'], 'none', 'no such folder')
  refused(capsys, ['compare', tmp_path / 'run', '--resamples', '0'], '--resamples', 'above 0')


def test_audit_says_by_its_exit_code_whether_a_finding_is_serious(tmp_path, capsys):
  leaking = [REVIEW | {'reviewerID': f'u{user}', 'asin': f'a{(user + item) % 9}', 'unixReviewTime': 1}
             for user in range(90) for item in range(5)]
  rows = sorted(leaking, key=lambda row: row['asin'])  # a dump that lists reviews by product, all of one day
  for ties, code in (('dump', 1), ('hashed', 0)):
    dump = write_lines(tmp_path / 'x.json.gz', rows)
    prepared = ['prepare', 'dumps', '--reviews', dump, '--name', ties, '--out', tmp_path / ties, '--ties', ties]
    assert cli.main([str(argument) for argument in prepared]) == 0
    capsys.readouterr()
    assert cli.main(['audit', str(tmp_path / ties), '--json']) == code
    assert bool(json.loads(capsys.readouterr().out)['serious']) == bool(code)
  refused(capsys, ['audit', tmp_path / 'none'], 'none', 'no such folder')
