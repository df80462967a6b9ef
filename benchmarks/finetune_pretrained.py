"""Finetunes a pretrained model on a small data set (stage II), and evaluates it beside the baselines.

The peer is the same model before finetuning: the ratio is validation L_NIG after / before. Prints texts sampled before and
after, the table of `calrec evaluate` on some users, and one JSON object as its last line.

  python benchmarks/finetune_pretrained.py --from MODEL.gguf --data_dir DATA --name gift_cards --out runs/finetune [--quick]

Minutes to half an hour on a CPU, for a model of 135 M parameters. The same command goes on where it stopped.
"""

import argparse
import gzip
import itertools
import json
import pathlib
import subprocess
import sys


def calrec(*arguments: str) -> dict:
  """Runs a verb of the command line; returns its JSON."""
  command = [sys.executable, '-m', 'calrec_jax.cli', *arguments, '--json']
  return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--from', dest='source', required=True, help='Hugging Face folder or GGUF file')
  parser.add_argument('--data_dir', required=True, help='holds the histories folder')
  parser.add_argument('--name', required=True, help='of the data set')
  parser.add_argument('--out', required=True, type=pathlib.Path, help='folder of the runs')
  parser.add_argument('--steps', type=int, default=50)
  parser.add_argument('--users', type=int, default=40, help='who are sampled for, and evaluated')
  parser.add_argument('--gin', action='append', default=[], help='more bindings of the training')
  parser.add_argument('--quick', action='store_true', help='2 steps, 4 users')
  options = parser.parse_args()
  steps, users = (2, 4) if options.quick else (options.steps, options.users)
  model = options.out / 'model'
  if not model.exists():
    calrec('import', '--from', options.source, '--out', str(model))
  data = [f"--gin.DATA_DIR='{options.data_dir}'", f"--gin.MIXTURE_OR_TASK_NAME='{options.name}'"]

  def train(name: str, *bindings: str) -> dict:
    return calrec('train', f'--gin_file={model}/model.gin', '--gin_file=gin/runs/stage2.gin', *data,
                  f"--gin.MODEL_DIR='{options.out / name}'", f"--gin.VOCABULARY='{model}/vocabulary.json'",
                  f"--gin.INITIAL_CHECKPOINT_PATH='{model}'", '--gin.BATCH_SIZE=2', '--gin.optimizer.warmup_steps=5',
                  "--gin.TASK_FEATURE_LENGTHS={'inputs': 192, 'targets': 64}", "--gin.rows.targets='all'",
                  f'--gin.schedule.eval_histories={users * 2}', '--gin.schedule.keep=1', *bindings)

  def generations(checkpoint: pathlib.Path, name: str) -> pathlib.Path:
    out = options.out / name
    if not (out / 'generations.jsonl.gz').exists():
      calrec('infer', '--gin_file=gin/runs/infer.gin', *data, f"--gin.CHECKPOINT_PATH='{checkpoint}'",
             f"--gin.INFER_OUTPUT_DIR='{out}'", f'--gin.sample.max_users={users}', '--gin.sample.n_samples=8',
             '--gin.sample.users_per_batch=4', '--gin.sample.max_new_tokens=48', '--gin.sample.max_prefix_length=192')
    return out

  before = train('before', '--gin.TRAIN_STEPS=1', '--gin.LEARNING_RATE=0.0')
  texts = {'before': generations(model, 'infer_before')}
  after = train('stage2', f'--gin.TRAIN_STEPS={steps}', '--gin.LEARNING_RATE=2e-4', *(f'--gin.{b}' for b in options.gin))
  texts['after'] = generations(options.out / 'stage2', 'infer_after')
  for when, folder in texts.items():
    with gzip.open(folder / 'generations.jsonl.gz', 'rt') as lines:
      for line in itertools.islice(lines, 3):
        print(f'{when}: {json.loads(line)["texts"][0]!r}')
  ndcg = {}
  for when, folder in texts.items():
    out = options.out / f'evaluate_{when}'
    if not (out / 'metrics.json').exists():
      calrec('evaluate', '--gin_file=gin/runs/evaluate.gin', *data, f"--gin.INFER_OUTPUT_DIR='{folder}'",
             f"--gin.EVAL_OUTPUT_DIR='{out}'", f'--gin.ranking.max_users={users}')
    methods = json.loads((out / 'metrics.json').read_text())['methods']
    ndcg |= {name if name != 'calrec' else f'calrec {when}': round(values['ndcg@10'], 4) for name, values in methods.items()}
  print(json.dumps({'name': 'finetune_pretrained', 'peer': 'the model before finetuning', 'ratio': after['nig'] / before['nig'],
                    'validation_nig': [before['nig'], after['nig']], 'validation_loss': [before['loss'], after['loss']],
                    'steps': steps, 'users': users, 'ndcg@10': ndcg}))


if __name__ == '__main__':
  main()
