"""`calrec describe`: counts what a data set is like, as JSON values."""

import os
import pathlib
from collections.abc import Mapping

from calrec_jax import outputs, storage
from calrec_jax.data import histories, similar_ids
from calrec_jax.description import items, purchases
from calrec_jax.text.templates import ItemTemplate


def describe(folder: str | os.PathLike, *, template: ItemTemplate, vocabulary: str | os.PathLike | None = None,
             length: int = 512, item_length: int = 64) -> dict:
  """Reads a histories folder and counts.

  Args:
    folder: the histories folder, in a bucket or not.
    template: writes an item's text; it says which texts are equal, and what is tokenized.
    vocabulary: a vocabulary, for counts of tokens; imports TensorFlow.
    length, item_length: see `tokens.lengths`.

  Returns:
    `name`, `fingerprint`, `split`, `template`, `preparation` (what dataset.json tells), `similar_ids` (counts of users and
    items), and what the functions of `purchases`, `items` and `tokens` return, each under its name; `tokens` is None without a
    vocabulary.

  Raises:
    UserError: no such folder, it is broken, no such vocabulary, or items that do not fit the length.
  """
  folder = storage.local(folder)
  dataset = histories.load(folder)
  tokenizer = None
  if vocabulary is not None:
    from calrec_jax.description import tokens
    from calrec_jax.text.vocabularies import load_vocabulary
    tokenizer = load_vocabulary(vocabulary)
  return {
      'name': dataset.name, 'fingerprint': dataset.fingerprint, 'split': 'leave_one_out' if dataset.cutoffs is None else 'time',
      'template': {'fields': list(template.fields), 'unknown': template.unknown},
      'preparation': _preparation(folder / 'dataset.json'),
      'sizes': purchases.sizes(dataset), 'similar_ids': similar_ids.counts(dataset.user_ids, dataset.item_ids),
      'length': purchases.length(dataset), 'popularity': purchases.popularity(dataset),
      'repeats': purchases.repeats(dataset), 'ties': purchases.ties(dataset), 'time': purchases.time(dataset),
      'problems': items.problems(dataset), 'duplicates': items.duplicates(dataset, template),
      'tokens': None if tokenizer is None else tokens.lengths(dataset, tokenizer, template=template, length=length,
                                                              item_length=item_length)}


def _preparation(path: pathlib.Path) -> dict:
  """The `options` of the preparation, what its steps `dropped`, its counts of broken lines and of metadata; {} if unknown."""
  if not path.is_file():
    return {}
  told = outputs.read_object(path)
  mapping = lambda value: value if isinstance(value, Mapping) else {}
  steps = [step for step in told.get('steps', []) if isinstance(step, Mapping)] if isinstance(told.get('steps'), list) else []
  bad = told.get('bad_lines', {})
  return {'options': dict(mapping(told.get('options'))),
          'dropped': [{'step': step.get('step'), 'events': step['dropped']} for step in steps if step.get('dropped')],
          'bad_lines': dict(mapping(bad)) or (bad if isinstance(bad, int) else 0),
          'metadata': dict(mapping(told.get('metadata')))}
