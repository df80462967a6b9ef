"""Every verb in turn, on real dumps and on a generated store, with a few steps of training."""

import contextlib
import gzip
import json
import pathlib
import re
import shlex
import subprocess

import jax
import numpy as np
import pytest
import tiny
import transformers
from file_server import FileServer

from calrec_jax import ablations, cli
from calrec_jax.evaluation.metrics import expected_metrics
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = {'calrec', 'last_item', 'popularity', 'transitions'}
RUN_FILES = ('config.gin', 'run.json')


def run(*arguments: str) -> None:
  assert cli.main([str(argument) for argument in arguments]) == 0


def lines(path: pathlib.Path) -> list[dict]:
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file]


def finish(folder: pathlib.Path, name: str, *more: str) -> dict:
  """Both stages, inference and evaluation on `folder/data/<name>`; returns metrics.json."""
  run('vocabulary', '--data', *sorted((folder / 'data').iterdir()), '--size', '400', '--out', folder / 'vocabulary.json')
  lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 32}"
  run(*tiny.gin_arguments(folder, 'stage1', folder / 'stage1'), lengths)
  run(*tiny.gin_arguments(folder, 'stage2', folder / 'stage2'), lengths,
      *tiny.gin([f"INITIAL_CHECKPOINT_PATH='{folder / 'stage1'}'", f"MIXTURE_OR_TASK_NAME='{name}'"]))
  data = tiny.gin([f"DATA_DIR='{folder / 'data'}'", f"MIXTURE_OR_TASK_NAME='{name}'", f"INFER_OUTPUT_DIR='{folder / 'infer'}'"])
  run('infer', '--gin_file=gin/runs/infer.gin', *data, *tiny.gin([
      f"CHECKPOINT_PATH='{folder / 'stage2'}'", 'sample.n_samples=4', 'sample.max_new_tokens=12', 'sample.max_users=20']))
  run('evaluate', '--gin_file=gin/runs/evaluate.gin', *data, *tiny.gin([
      f"EVAL_OUTPUT_DIR='{folder / 'evaluate'}'", 'ranking.max_users=20']), *more)
  return json.loads((folder / 'evaluate/metrics.json').read_text())


def check_results(folder: pathlib.Path, metrics: dict, methods: set[str]) -> None:
  """The schema of metrics.json and of the rankings, and that the one follows from the other."""
  assert {'protocol', 'users', 'items', 'methods'} <= metrics.keys()
  assert {'name', 'hash'} <= metrics['protocol'].keys()
  assert metrics['methods'].keys() == methods
  for method, values in metrics['methods'].items():
    assert {'recall@1', 'recall@10', 'ndcg@10', 'mrr'} <= values.keys()
    rows = lines(folder / f'evaluate/rankings-{method}.jsonl.gz')
    assert len(rows) == metrics['users'] == 20
    assert all({'user_id', 'target', 'better', 'tied', 'top'} == row.keys() for row in rows)
    assert all(len(row['top']) == min(100, metrics['items']) for row in rows)
    assert all(row['better'] + row['tied'] < metrics['items'] for row in rows)
    again = expected_metrics(np.asarray([row['better'] for row in rows]), np.asarray([row['tied'] for row in rows]))
    for name, value in values.items():
      np.testing.assert_allclose(value, again[name].mean(), rtol=1e-9, err_msg=f'{method} {name}')
  for generation in lines(folder / 'infer/generations.jsonl.gz'):
    assert len(set(generation['texts'])) == len(generation['texts']) == len(generation['logprobs']) > 0
    assert generation['logprobs'] == sorted(generation['logprobs'], reverse=True)
  for stage in ('stage1', 'stage2', 'infer', 'evaluate'):
    assert all((folder / stage / file).stat().st_size for file in RUN_FILES), stage
    assert json.loads((folder / stage / 'run.json').read_text())['data']
  assert tiny.scalars(folder / 'infer', 'infer/texts_per_user') and tiny.scalars(folder / 'evaluate', 'test/calrec/ndcg@10')
  assert tiny.scalars(folder / 'stage2', 'train/nig') and tiny.scalars(folder / 'stage2', 'validation/nig')


def test_gift_cards_through_every_verb(real_data, tmp_path, capsys):
  dumps = real_data / 'amazon2018_raw'
  run('prepare', 'dumps', '--reviews', dumps / 'Gift_Cards_5.json.gz', '--meta', dumps / 'meta_Gift_Cards.json.gz',
      '--name', 'gift_cards', '--out', tmp_path / 'data/gift_cards')
  metrics = finish(tmp_path, 'gift_cards')
  assert 'CALRec' in capsys.readouterr().out
  check_results(tmp_path, metrics, METHODS)
  assert metrics['items'] == 147


def test_a_generated_store_through_every_verb(tmp_path, capsys):
  run('synthesize', '--out', tmp_path / 'store', '--users', 120, '--items', 40, '--categories', 2, '--seed', 0)
  for reviews in (tmp_path / 'store').glob('*_5.json.gz'):
    name = reviews.name.removesuffix('_5.json.gz')
    run('prepare', 'dumps', '--reviews', reviews, '--meta', tmp_path / f'store/meta_{name}.json.gz', '--name', name,
        '--out', tmp_path / f'data/{name}')
  metrics = finish(tmp_path, name, f"--gin.STORE='{tmp_path / 'store'}'")
  check_results(tmp_path, metrics, METHODS | {'ceiling'})
  assert metrics['methods']['ceiling']['ndcg@10'] > 2 * metrics['methods']['popularity']['ndcg@10']
  assert 'truth' in capsys.readouterr().out


@pytest.mark.parametrize('ablation', sorted(path.stem for path in (ROOT / 'gin/ablations').glob('*.gin')))
def test_each_ablation_trains(ablation, tiny_store, tmp_path):
  stage = 'stage2' if ablation == 'stage2_only' else 'stage1'
  more = ['schedule.eval_histories=0'] + ["MIXTURE_OR_TASK_NAME='books'"] * (stage == 'stage2')
  run(*tiny.gin_arguments(tiny_store, stage, tmp_path / 'run'), f'--gin_file=gin/ablations/{ablation}.gin', *tiny.gin(more))
  losses = tiny.scalars(tmp_path / 'run', 'train/loss')
  assert np.isfinite(list(losses.values())).all() and losses


def test_the_contrastive_terms_are_off_without_contrast(tiny_store, tmp_path):
  for ablation, zero in (('no_contrastive', {'tt', 'ut'}), ('no_tt', set())):
    folder = tmp_path / ablation
    run(*tiny.gin_arguments(tiny_store, 'stage1', folder), f'--gin_file=gin/ablations/{ablation}.gin',
        '--gin.schedule.eval_histories=0')
    assert {term for term in ('tt', 'ut') if not tiny.scalars(folder, f'train/{term}')[f'train/{term}', 2]} == zero


def test_stage_two_of_the_paper_reads_its_settings(tiny_store, tmp_path):
  more = [f"INITIAL_CHECKPOINT_PATH='{tmp_path / 'one'}'", "MIXTURE_OR_TASK_NAME='books'", "inputs.mixture=('books', 'games')"]
  run(*tiny.gin_arguments(tiny_store, 'stage1', tmp_path / 'one'))
  run(*tiny.gin_arguments(tiny_store, 'stage2', tmp_path / 'two'), '--gin_file=gin/runs/paper.gin', *tiny.gin(more))
  text = (tmp_path / 'two/config.gin').read_text()
  assert "rows.targets = 'last'" in text and 'objective.alpha = 0.125' in text


def readme_commands(program: str) -> list[list[str]]:
  """The README's commands of one program, as argument lists."""
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  blocks = re.findall(r'```bash\n(.*?)```', text, flags=re.DOTALL)
  commands = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
  return [shlex.split(command)[1:] for command in commands if command.startswith(f'{program} ')]


@pytest.fixture
def publisher(monkeypatch):
  """The server that the README's dumps are fetched from, here."""
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  with FileServer({}) as server:
    yield server


def test_the_commands_of_the_readme(publisher, tmp_path, monkeypatch):
  """In a folder with a shop's files; only the numbers of steps, users and samples are made small, and the decoder."""
  monkeypatch.chdir(tmp_path)
  run('synthesize', '--out', 'store', '--users', '60', '--items', '40', '--categories', '1')
  for path, name in (('/categoryFilesSmall/Gift_Cards_5.json.gz', '*_5.json.gz'),
                     ('/metaFiles2/meta_Gift_Cards.json.gz', 'meta_*')):
    publisher.files[path] = next(pathlib.Path('store').glob(name)).read_bytes()
  shop = tiny.make_histories('shop')
  write = lambda name, rows: pathlib.Path(name).write_bytes(gzip.compress('\n'.join(map(json.dumps, rows)).encode()))
  write('items.jsonl.gz', [{'item_id': i} | item for i, item in zip(shop.item_ids, shop.items, strict=True)])
  write('sequences.jsonl.gz', [{'user_id': user, 'item_ids': [shop.item_ids[i] for i in shop.history(number)]}
                               for number, user in enumerate(shop.user_ids)])
  pathlib.Path('events.csv').write_text('user_id,item_id,timestamp\n' + ''.join(
      f'{user},{(user + day) % 9},{1_600_000_000 + day}\n' for user in range(20) for day in range(5)))
  pathlib.Path('products.csv').write_text('item_id,name,genre\n' + ''.join(f'{n},"Film, {n}",Drama\n' for n in range(9)))
  small = {
      'download': ['--yes', '--mirror', publisher.url],
      'train': ['--gin.TRAIN_STEPS=2', '--gin.BATCH_SIZE=8', "--gin.TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 32}",
                '--gin.rows.window_steps=4', *tiny.gin(tiny.DECODER_GIN)],
      'infer': tiny.gin(['sample.max_users=8', 'sample.n_samples=2', 'sample.max_new_tokens=4']),
      'evaluate': tiny.gin(['ranking.max_users=8']),
      'baselines': ['--max_users', '8'],
      'plan': ['--tries', '1', '--gin.TASK_FEATURE_LENGTHS={"inputs": 96, "targets": 32}', *tiny.gin(tiny.DECODER_GIN)]}
  small['ablate'] = ['--seeds', '1', *(option for verb in ('train', 'infer', 'evaluate') for option in small[verb])]
  monkeypatch.setattr(ablations.subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(
      command, cli.main(command[3:])))
  commands = readme_commands('calrec')
  verbs = {'download', 'prepare', 'describe', 'vocabulary', 'cache', 'train', 'infer', 'evaluate', 'index', 'recommend',
           'import', 'score', 'export', 'baselines', 'compare', 'audit', 'report', 'ablate', 'plan'}
  assert {command[0] for command in commands} == verbs
  for command in commands:
    if command[0] == 'import' and not (source := pathlib.Path(command[command.index('--from') + 1])).exists():
      pretrained_folder(source)
    if command[0] == 'recommend':  # of the items that this store has
      command[command.index('--history') + 1] = ','.join(row['item_id'] for row in lines(pathlib.Path(
          'data/gift_cards/items.jsonl.gz'))[:2])
    imported = any(argument.endswith('/model.gin') for argument in command)  # brings its own shape
    # What is compiled for TPUs has products of bfloat16, which have one precision.
    with jax.default_matmul_precision('default') if command[0] == 'plan' else contextlib.nullcontext():
      run(*command, *[option for option in small.get(command[0], []) if not imported or '.decoder.' not in option])
  assert (tmp_path / 'runs/evaluate/metrics.json').exists()
  assert '| calrec |' in (tmp_path / 'exported/README.md').read_text()


def pretrained_folder(folder: pathlib.Path) -> None:
  """A tiny model as one downloads it, with a tokenizer of bytes."""
  config = transformers.LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2, num_key_value_heads=1)
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  train_vocabulary([], size=300, phrases=template_phrases(ItemTemplate())).write_huggingface(folder)


def test_the_readme_s_tpu_command_and_the_names_of_its_scripts():
  [arguments] = readme_commands('launch/tpu_run.sh')
  assert '--dry_run' in arguments
  done = subprocess.run(['bash', 'launch/tpu_run.sh', *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
  assert 'gcloud' in done.stdout and 'TRAIN_STEPS=10000' in done.stdout
  for script in ('launch/demo.sh', 'launch/test.sh'):
    assert readme_commands(script) and (ROOT / script).exists()
