"""The commands of docs/tpu.md: each is read by the command line it is for, and what it names exists."""

import pathlib
import re
import shlex
import subprocess

import gin
import pytest
from fake_gcloud import TPU_RUN

from calrec_jax import cli, configurables
from calrec_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def commands() -> list[list[str]]:
  """The words of each line of each block of shell."""
  text = (ROOT / 'docs/tpu.md').read_text(encoding='utf-8')
  blocks = re.findall(r'```bash\n(.*?)```', text, flags=re.DOTALL)
  return [shlex.split(line) for block in blocks for line in block.replace('\\\n', ' ').splitlines()]


def check_calrec(words: list[str]) -> str:
  """Parses a command of `calrec`, its gin files and bindings too; returns the verb."""
  options = cli.parser().parse_args([word for word in words if not word.startswith('--gin.')])
  bindings = [word.removeprefix('--gin.') for word in words if word.startswith('--gin.')]
  if getattr(options, 'gin_file', None):  # an imported model's own file is not here; this one sets the decoder's shape, too
    files = [file.replace('gs://my-bucket/smollm2/model.gin', 'gin/models/smollm2_135m.gin') for file in options.gin_file]
    configurables.parse(files, [], bindings, whole=options.verb != 'plan')
    gin.clear_config()
  return options.verb


def test_the_commands_of_the_guide(monkeypatch):
  monkeypatch.chdir(ROOT)
  seen, on_tpus = [], []
  for words in commands():
    if words[0] == 'calrec':
      seen.append(check_calrec(words[1:]))
    elif words[0] == 'launch/tpu_run.sh':
      done = subprocess.run([TPU_RUN, '--dry_run', *words[1:]], capture_output=True, text=True)
      assert done.returncode == 0 and 'gcloud compute tpus' in done.stdout, done.stderr
      if '--' in words:
        on_tpus.append(check_calrec(words[words.index('--') + 1:]))
    else:
      assert words[0] in ('gcloud', 'eval') or words[0].startswith('number='), words
  assert seen == ['plan', 'plan', 'prepare', 'prepare', 'import', 'evaluate', 'report']
  assert on_tpus == ['train', 'train', 'infer', 'train']


@pytest.mark.parametrize('words', [
    ['infr'],
    ['import', '--form', 'x', '--out', 'y'],
    ['train', '--gin_file=gin/runs/stage3.gin', '--gin.A=1'],
    ['infer', '--gin_file=gin/runs/infer.gin', '--gin.sample.n_sample=1'],
])
def test_a_wrong_command_would_be_noticed(words):
  with pytest.raises((SystemExit, UserError)):
    check_calrec(words)


def test_what_the_guide_says_that_the_script_says():
  said = re.findall(r'^\| `([^`]*?)(?: \.\.\.)?`', (ROOT / 'docs/tpu.md').read_text(encoding='utf-8'), flags=re.MULTILINE)
  script = TPU_RUN.read_text(encoding='utf-8')
  # Names and numbers are the script's variables.
  patterns = [re.sub(r'calrec|still\\ exists|\b\d+\b(?!\\ was|\\ does)', r'\\S+', re.escape(text)) for text in said]
  assert len(said) == 7 and [text for text in patterns if not re.search(text, script)] == []
