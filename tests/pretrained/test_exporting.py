"""What is exported is a whole Hugging Face folder: weights with factors merged, tokenizer, model card."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pretrained_models
import pytest
import tiny
import torch
import transformers

from calrec_jax.errors import UserError
from calrec_jax.inference.loading import load
from calrec_jax.pretrained.exporting import export_model
from calrec_jax.pretrained.importing import import_model
from calrec_jax.text.vocabularies import load_vocabulary

TEXT = ' Title: books a0. Category: red.'
METRICS = {'protocol': {'name': 'leave_one_out_full', 'ties': 'a | b'}, 'methods': {'calrec': {'ndcg@10': 0.25, 'n': 3},
                                                                                   'popularity': {'ndcg@10': 0.125, 'n': 3}}}


def check_logits(checkpoint, exported):
  """Transformers' logits of a text are ours; the tokenizer's ids too."""
  loaded = load(checkpoint, dtype='float32')
  ids = loaded.vocabulary.encode(TEXT)
  assert transformers.AutoTokenizer.from_pretrained(exported)(TEXT).input_ids == ids
  tokens = np.array(ids)[None]
  states = loaded.decoder.apply({'params': loaded.params}, tokens, tokens * 0 + 1, np.arange(len(ids))[None])
  ours = loaded.decoder.apply({'params': loaded.params}, states, method='logits')[0]
  model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
  np.testing.assert_allclose(pretrained_models.logits(model, ids), ours, atol=1e-4)


@pytest.fixture(scope='module')
def base(tmp_path_factory, tiny_store):
  """An imported model with the store's tokenizer, and a run of factors that began with it."""
  folder = tmp_path_factory.mktemp('base')
  vocabulary = load_vocabulary(tiny_store / 'vocabulary.json')
  name, options = pretrained_models.MODELS['qwen3']
  sizes = {'hidden_size': 32, 'intermediate_size': 64, 'vocab_size': 384, 'num_attention_heads': 8, 'num_key_value_heads': 4}
  pretrained_models.MODELS['store'] = (name, options | sizes)
  model = pretrained_models.make('store')
  del pretrained_models.MODELS['store']
  model.save_pretrained(folder / 'hf')
  vocabulary.write_huggingface(folder / 'hf')
  (folder / 'hf/README.md').write_text('---\nlicense: apache-2.0\n---\n')
  import_model(folder / 'hf', folder / 'model')
  config = dataclasses.replace(load(folder / 'model').found.decoder_config(), lora_rank=2, lora_targets=('value', 'up'))
  inputs = tiny.inputs(tiny_store, vocabulary=load_vocabulary(folder / 'model/vocabulary.json'))
  tiny.train(tiny_store, folder / 'run', decoder=config, inputs=inputs, initial_checkpoint=str(folder / 'model'), train_steps=2)
  return folder


def test_a_finetuned_model_goes_back_with_its_factors_merged(base, tmp_path):
  (tmp_path / 'metrics.json').write_text(json.dumps(METRICS))
  report = export_model(base / 'run', tmp_path / 'out', metrics=tmp_path / 'metrics.json')
  assert report['architecture'] == 'qwen3' and report['files'] == 1 and report['dtype'] == 'float32'
  check_logits(base / 'run', tmp_path / 'out')
  before = transformers.AutoModelForCausalLM.from_pretrained(base / 'hf').state_dict()
  after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').state_dict()
  moved = {key.split('.')[-2] for key in before if not torch.equal(before[key], after[key])}
  assert moved == {'v_proj', 'up_proj'}
  card = (tmp_path / 'out/README.md').read_text()
  assert card.startswith('---\n') and 'license: "apache-2.0"\n' in card.split('---')[1]
  for words in ('PreTrainedTokenizerFast.from_pretrained', 'hf (qwen3, ', 'licence: apache-2.0', 'books', 'games', 'nig: ',
                '| calrec | 0.2500 |', 'leave_one_out_full', 'ties: a / b', 'step 2 of this stage'):
    assert words in card, words


def test_an_exported_model_is_imported_again_as_it_was(base, tmp_path):
  export_model(base / 'model', tmp_path / 'out')
  import_model(tmp_path / 'out', tmp_path / 'again')
  first, second = load(base / 'model'), load(tmp_path / 'again')
  assert first.decoder == second.decoder
  assert first.vocabulary.encode(TEXT) == second.vocabulary.encode(TEXT) and first.vocabulary.eos_id == second.vocabulary.eos_id
  np.testing.assert_array_equal(first.params['layers']['mlp']['up']['kernel'], second.params['layers']['mlp']['up']['kernel'])
  assert 'not finetuned' in (tmp_path / 'out/README.md').read_text()


def test_a_model_trained_from_random_weights_is_a_llama(tiny_store, tmp_path):
  tiny.train(tiny_store, tmp_path / 'run', train_steps=1)
  assert export_model(tmp_path / 'run', tmp_path / 'out')['architecture'] == 'llama'
  check_logits(tmp_path / 'run', tmp_path / 'out')
  assert 'trained from random weights' in (tmp_path / 'out/README.md').read_text()


def test_a_qwen_2_with_another_vocabulary_is_read_as_the_card_says(tmp_path):
  pretrained_models.save(pretrained_models.make('qwen2'), tmp_path / 'hf')
  import_model(tmp_path / 'hf', tmp_path / 'checkpoint')
  export_model(tmp_path / 'checkpoint', tmp_path / 'out')
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'out')
  assert theirs('AZBQ').input_ids == load(tmp_path / 'checkpoint').vocabulary.encode('AZBQ')


def test_bfloat16_goes_back_as_bfloat16(tmp_path):
  model = pretrained_models.make('llama').to(torch.bfloat16)
  import_model(pretrained_models.save(model, tmp_path / 'hf'), tmp_path / 'checkpoint')
  assert export_model(tmp_path / 'checkpoint', tmp_path / 'out')['dtype'] == 'bfloat16'
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype='auto')
  assert again.dtype == torch.bfloat16
  for key, value in model.state_dict().items():
    assert torch.equal(again.state_dict()[key], value)
  assert jnp.dtype(jnp.bfloat16) == load(tmp_path / 'checkpoint', param_dtype='bfloat16').params['embedding'].dtype


@pytest.mark.parametrize('case, message', [
    ('no metrics', 'give a metrics.json'), ('in use', 'already in use'), ('no checkpoint', 'holds no checkpoint')])
def test_what_cannot_be_exported_leaves_nothing(base, tmp_path, case, message):
  out, metrics, checkpoint = tmp_path / 'out', None, base / 'model'
  if case == 'no metrics':
    metrics = tmp_path / 'metrics.json'
  elif case == 'in use':
    out = base / 'hf'
  else:
    checkpoint = tmp_path
  before = sorted(path.name for path in out.parent.iterdir())
  with pytest.raises(UserError, match=message) as error:
    export_model(checkpoint, out, metrics=metrics)
  assert '\n' not in str(error.value) and sorted(path.name for path in out.parent.iterdir()) == before


def test_an_imported_model_is_not_a_run_to_go_on_with(base, tiny_store):
  loaded = load(base / 'model')
  with pytest.raises(UserError, match='holds an imported model; choose another MODEL_DIR'):
    tiny.train(tiny_store, base / 'model', decoder=loaded.found.decoder_config(),
               inputs=tiny.inputs(tiny_store, vocabulary=loaded.vocabulary))
