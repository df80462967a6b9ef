"""Imports that go wrong leave one line and no file; those that go right leave a checkpoint that a run can start from."""

import json
import pickle
import subprocess
import sys

import gguf_models
import jax
import ml_dtypes
import numpy as np
import pretrained_models
import pytest
import safetensors.numpy
import torch

from calrec_jax.errors import UserError
from calrec_jax.inference.generate import forbidden_ids
from calrec_jax.inference.loading import load
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.pretrained.importing import gin_text, import_model
from calrec_jax.pretrained.safetensors_files import INDEX, SafetensorsSource


@pytest.fixture
def source(tmp_path):
  return pretrained_models.save(pretrained_models.make('llama'), tmp_path / 'hf')


def edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder, change):
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')


def no_weights(folder):
  (folder / 'model.safetensors').unlink()


def missing_shard(folder):
  pretrained_models.make('llama').save_pretrained(folder, max_shard_size='8KB')
  no_weights(folder)
  sorted(folder.glob('model-*.safetensors'))[1].unlink()


def pickled(folder):
  no_weights(folder)
  with open(folder / 'pytorch_model.bin', 'wb') as file:
    pickle.dump({'weight': print}, file)


def truncated(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


def truncated_header(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:50])


def of_integers(tensors):
  tensors['model.norm.weight'] = np.ones(24, np.int32)


BROKEN = {
    'missing shard': (missing_shard, r'model-00002-of-\d+.safetensors: missing, of \d+ shards'),
    'wrong shape': (lambda f: retensor(f, lambda t: t.update({'model.norm.weight': np.ones(23, np.float32)})),
                    r'model.norm.weight has the shape \(23,\), by the configuration it is \(24,\)'),
    'missing tensor': (lambda f: retensor(f, lambda t: t.pop('model.layers.1.mlp.up_proj.weight')),
                       '1 tensors are missing, such as model.layers.1.mlp.up_proj.weight'),
    'strange tensor': (lambda f: retensor(f, lambda t: t.update({'adapter.a': np.ones(2, np.float32)})),
                       'not of the architecture llama, such as adapter.a'),
    'integers': (lambda f: retensor(f, of_integers), 'model.norm.weight is of the type I32; known are F32, F16, BF16'),
    'architecture': (lambda f: edit(f / 'config.json', model_type='mamba'), "'mamba' is not known; known are llama, qwen2"),
    'pickle': (pickled, 'pytorch_model.bin: a pickle, which can run code.*safetensors'),
    'nothing': (no_weights, 'holds no model.safetensors'),
    'tokenizer too large': (lambda f: pretrained_models.save_tokenizer(f, 41),
                            'the tokenizer has 41 ids, the embedding 40 rows'),
    'truncated': (truncated, 'not a whole safetensors file'),
    'truncated header': (truncated_header, 'not a whole safetensors file'),
    'no config': (lambda f: (f / 'config.json').unlink(), 'config.json: cannot be read'),
    'broken config': (lambda f: (f / 'config.json').write_text('{'), 'config.json: not JSON'),
    'no tokenizer': (lambda f: (f / 'tokenizer.json').unlink(), 'tokenizer.json: the vocabulary cannot be read'),
    'an index of files elsewhere': (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
                                    'names no shards'),
    'broken index': (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), 'names no shards')}


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_folder_is_named_in_one_line_and_nothing_is_written(source, tmp_path, case):
  damage, message = BROKEN[case]
  damage(source)
  with pytest.raises(UserError, match=message) as error:
    import_model(source, tmp_path / 'out')
  assert str(source) in str(error.value) and '\n' not in str(error.value)
  assert {path.name for path in tmp_path.iterdir()} == {'hf'}


def test_a_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
  def full(self, name, start=0, stop=None):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(SafetensorsSource, 'read', full)
  with pytest.raises(OSError):
    import_model(source, tmp_path / 'out')
  assert {path.name for path in tmp_path.iterdir()} == {'hf'}


def test_what_is_there_is_not_overwritten(source, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match='already in use'):
    import_model(source, tmp_path / 'out')
  assert (tmp_path / 'out' / 'notes.txt').read_text() == 'mine'


def test_the_report_and_the_gin_file(source, tmp_path):
  (source / 'README.md').write_text('---\nlanguage: en\nlicense: mit\n---\n# A model\n')
  report = import_model(source, tmp_path / 'out')
  expected = sum(p.numel() for p in pretrained_models.make('llama').parameters())
  assert report == {'name': 'hf', 'architecture': 'llama', 'parameters': expected, 'layers': 3, 'vocabulary': 37,
                    'embedding_rows': 40, 'bos': None, 'eos': '</s>', 'dtype': 'float32', 'license': 'mit',
                    'out': str(tmp_path / 'out')}
  lines = [line for line in (tmp_path / 'out/model.gin').read_text().splitlines() if line.startswith('decoder.')]
  fields = dict(line.removeprefix('decoder.').split(' = ') for line in lines)
  config = DecoderConfig(**{name: json.loads(value.lower()) for name, value in fields.items()})
  assert config == SafetensorsSource(source).config


def test_rows_that_no_token_has_are_never_sampled(source, tmp_path):
  import_model(source, tmp_path / 'out')
  loaded = load(tmp_path / 'out')
  assert forbidden_ids(loaded.vocabulary, 40).nonzero()[0].tolist() == [0, 37, 38, 39]


@pytest.mark.parametrize('asked, stored', [('auto', 'bfloat16'), ('float32', 'float32')])
def test_weights_keep_their_type_or_get_the_one_asked_for(tmp_path, asked, stored):
  model = pretrained_models.make('llama').to(torch.bfloat16)
  report = import_model(pretrained_models.save(model, tmp_path / 'hf'), tmp_path / 'out', dtype=asked)
  assert report['dtype'] == stored
  params = load(tmp_path / 'out').params  # restored as float32, whatever is stored
  np.testing.assert_array_equal(params['embedding'], model.model.embed_tokens.weight.float().detach().numpy())
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  assert load(tmp_path / 'out', param_dtype='bfloat16').params['embedding'].dtype == ml_dtypes.bfloat16


def test_float16_becomes_float32(tmp_path):
  model = pretrained_models.make('llama').half()
  report = import_model(pretrained_models.save(model, tmp_path / 'hf'), tmp_path / 'out')
  assert report['dtype'] == 'float32'
  expected = model.model.embed_tokens.weight.float().detach().numpy()
  np.testing.assert_array_equal(load(tmp_path / 'out').params['embedding'], expected)


def test_what_a_file_says_of_itself_does_not_become_gin(source, tmp_path):
  forged = 'A model\ndecoder.n_layers = 99\r\u2028import os\x1b[2J'
  edit(source / 'config.json', _name_or_path=forged)
  report = import_model(source, tmp_path / 'out')
  text = (tmp_path / 'out/model.gin').read_text()
  assert report['name'] == 'A model decoder.n_layers = 99 import os[2J' and report['name'] in text.splitlines()[0]
  mutant = gin_text(load(tmp_path / 'out').found.decoder_config(), {'name': forged, 'parameters': 1, 'architecture': 'llama',
                                                                   'license': None})
  for written, layers in ((text, ['decoder.n_layers = 3']), (mutant, ['decoder.n_layers = 99', 'decoder.n_layers = 3'])):
    assert [line for line in written.splitlines() if line.startswith('decoder.n_layers')] == layers


def test_in_the_hubs_cache_the_model_has_its_own_name(tmp_path):
  folder = tmp_path / 'models--maker--tiny-1B' / 'snapshots' / '0123abc'
  assert SafetensorsSource(pretrained_models.save(pretrained_models.make('llama'), folder)).about['name'] == 'maker/tiny-1B'


def test_another_type_of_numbers_is_refused(source, tmp_path):
  with pytest.raises(UserError, match="dtype = 'float16': choose one of auto, float32, bfloat16"):
    import_model(source, tmp_path / 'out', dtype='float16')


def test_text_tensors_of_a_model_that_sees_pictures_are_found(tmp_path, caplog):
  model = pretrained_models.make('gemma3')
  folder = pretrained_models.save(model, tmp_path / 'hf')
  for before in ('language_model.model.', 'model.language_model.'):
    tensors = {before + key.removeprefix('model.'): value.numpy() for key, value in model.state_dict().items()
               if key != 'lm_head.weight'}
    safetensors.numpy.save_file(tensors | {'vision_tower.a': np.ones(3, np.float32)}, folder / 'model.safetensors')
    assert SafetensorsSource(folder).names() == {key for key in model.state_dict() if key != 'lm_head.weight'}
    assert '1 tensors for pictures are left out' in caplog.messages[-1]


MEMORY = """
import sys, gguf, safetensors
from calrec_jax.pretrained import importing
def megabytes(key):
  return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key)) / 1024
importing.checkpoints.write_params(sys.argv[2] + '/warm', {'x': importing.np.zeros(3)}, {})
list(importing.tensors(importing.DecoderConfig(vocab_size=8)))  # JAX itself takes 45 MB when it is first used
before = megabytes('VmRSS')
importing.import_model(sys.argv[1], sys.argv[2] + '/out')
print(megabytes('VmHWM') - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('kind', ['safetensors', 'gguf'])
def test_an_import_needs_little_more_memory_than_the_parameters(tmp_path, kind, monkeypatch):
  monkeypatch.setitem(pretrained_models.MODELS, 'large', ('LlamaConfig', {
      'hidden_size': 1024, 'intermediate_size': 4096, 'num_hidden_layers': 3, 'vocab_size': 16384, 'head_dim': 64,
      'tie_word_embeddings': True}))
  model = pretrained_models.make('large')
  size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
  monkeypatch.setattr(pretrained_models, 'save_tokenizer', lambda folder, n: None)
  monkeypatch.setattr(gguf_models, 'letters', lambda n: ['<pad>', '</s>', 'A', 'B', 'AB'])
  source = gguf_models.write(model, tmp_path / 'model.gguf', kind='Q8_0') if kind == 'gguf' else (
      pretrained_models.save(model, tmp_path / 'hf'))
  if kind == 'safetensors':
    monkeypatch.undo()
    pretrained_models.save_tokenizer(source, 40)
  del model
  run = subprocess.run([sys.executable, '-c', MEMORY, str(source), str(tmp_path)], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  assert size > 200 and float(run.stdout.splitlines()[-1]) < 1.3 * size, (run.stdout, size)
