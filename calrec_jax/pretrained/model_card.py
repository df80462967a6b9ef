"""The model card of an exported checkpoint: base model and its licence, data, protocol, metrics."""

import json
from collections.abc import Mapping
from typing import Any

from calrec_jax.training.checkpoints import Found

_PROMPT = 'This is the summary of a user\'s purchase history. The first item bought is as follows. …'

# transformers 5 gives models of the type qwen2 a tokenizer of its own with AutoTokenizer, whatever is written.
_USE = ['```python', 'from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast', '',
        'model = AutoModelForCausalLM.from_pretrained(FOLDER)',
        'tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)', '```', '']


def write(found: Found, metrics: Mapping[str, Any] | None) -> str:
  """The card, Markdown with YAML front matter.

  Args:
    found: the checkpoint.
    metrics: what `calrec evaluate` wrote, if it is known.
  """
  description = found.description
  pretrained, data = description.get('pretrained'), description.get('data')
  front = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', 'tags: [sequential-recommendation, calrec]']
  if pretrained and pretrained.get('license'):
    front.append(f'license: {json.dumps(pretrained["license"])}')
  lines = [*front, '---', '', f'# {found.model_dir.name}', '']
  if data is None:
    lines += ['An imported model, not finetuned.', '']
  else:
    lines += ['A language model finetuned with CALRec (arXiv 2405.02429), by calrec_jax: it reads a shopper\'s purchases as '
              'text and writes the text of the next one.', '', f'It reads: `{_PROMPT}`', '']
  lines += [*_USE, '## Base model', '', _base(pretrained), '']
  if data is not None:
    lines += ['## Training', '', f'- data: {_inline(data)}', f'- step {found.step} of this stage, seed {description["seed"]}',
              f'- item texts: {_inline(description["template"])}', f'- validation: {_inline(description["validation"])}', '']
  lines += ['## Evaluation', '', *(_table(metrics) if metrics else ['Not evaluated.']), '']
  return '\n'.join(lines)


def _base(pretrained: Mapping[str, Any] | None) -> str:
  if not pretrained:
    return 'None: trained from random weights.'
  return (f'{pretrained["name"]} ({pretrained["architecture"]}, {pretrained["parameters"]:,} parameters, from '
          f'`{pretrained["source"]}`), licence: {pretrained["license"] or "not stated; look it up before you pass this on"}.')


def _table(metrics: Mapping[str, Any]) -> list[str]:
  """The protocol, and a row for each method."""
  methods = metrics['methods']
  names = [name for name, value in next(iter(methods.values())).items() if isinstance(value, float)]
  rows = [f'| {method} | ' + ' | '.join(f'{values[name]:.4f}' for name in names) + ' |' for method, values in methods.items()]
  return [f'Protocol: {_inline(metrics["protocol"])}', '', f'| | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|', *rows]


def _inline(value: Any) -> str:
  """A nested value on one line, without line breaks or bars of its own, which would be Markdown."""
  if isinstance(value, Mapping):
    return ', '.join(f'{key}: {_inline(inner)}' for key, inner in value.items()) or 'none'
  if isinstance(value, list | tuple):
    return ' · '.join(map(_inline, value))
  text = f'{value:.4g}' if isinstance(value, float) else str(value)
  return text.replace('\n', ' ').replace('|', '/')
