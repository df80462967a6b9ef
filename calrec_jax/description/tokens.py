"""What is counted of tokens: how long items and histories are for a vocabulary, and what does not fit a context."""

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.description import distributions
from calrec_jax.description.purchases import part
from calrec_jax.errors import UserError
from calrec_jax.inference.prefixes import make_prefixes
from calrec_jax.text.batches import RowOptions
from calrec_jax.text.corpus import Source, build_corpus, excerpts
from calrec_jax.text.item_tokens import ItemTokens, item_tokens
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import TokenizerVocabulary

_UNCUT = 2**40  # tokens
_OTHERS = (1 / 4, 1 / 2, 1, 2, 4)  # of the length asked for, those that are looked at beside it


def lengths(dataset: Histories, vocabulary: TokenizerVocabulary, *, template: ItemTemplate, length: int, item_length: int
            ) -> dict:
  """Tokens of items and histories, and what is cut, by the code that cuts it in a run with such TASK_FEATURE_LENGTHS.

  Args:
    dataset: the data set.
    vocabulary: makes the tokens.
    template: writes an item's text.
    length: most tokens of a history with its target: 'inputs' and 'targets' together.
    item_length: most tokens of an item: 'targets'.

  Returns:
    `length`, `item_length`, `vocabulary` (fingerprint and size). `items`: `quantiles` and `histogram` of all items, whole, and
    how many are `cut`. `histories`: `quantiles` and `histogram` of all that have two visible events or more, whole, with
    prompts, their items cut. `training`: for several lengths `histories` (train parts of two events or more), `cut` histories,
    `events` of all train parts, those `lost` where only the newest items are kept (`rows.targets = 'last'`), and the `windows`
    that hold all of them (`rows.targets = 'all'`). `inference`: `histories` before the test target, `cut` ones, their `events`,
    those `lost`.

  Raises:
    UserError: two of the items may not fit `length`.
  """
  if item_length >= length:
    raise UserError(f'--length {length} and --item_length {item_length} leave no room for a history; raise the first, or lower '
                    'the second, so that an item and its prompts fit beside the target.')
  table = item_tokens([template.item_text(item) for item in dataset.items], vocabulary)
  make = lambda split: build_corpus([Source(dataset, table)], template=template, vocabulary=vocabulary, split=split,
                                    max_item_tokens=item_length)
  whole, train, lengths_I = make('test'), make('train'), np.diff(table.offsets)
  options = {'targets': 'last', 'context_items': RowOptions().context_items}
  try:
    excerpts(whole, length=length, **options)
    inference = _inference(dataset, vocabulary, table, length - item_length, item_length)
  except UserError as error:
    raise UserError(f"--length {length} ('inputs' and 'targets' together), --item_length {item_length} ('targets'): {error}"
                    ) from error
  whole_H = excerpts(whole, length=_UNCUT, **options).tokens
  training = []
  for tried in sorted({int(length * factor) for factor in _OTHERS}):
    try:
      last, windows = (excerpts(train, length=tried, **options | {'targets': targets}).cut for targets in ('last', 'all'))
    except UserError:  # too short for two items
      continue
    training.append({'length': tried, 'histories': last['histories'] - last['histories_without_target'],
                     'cut': part(last['histories_cut'], last['histories'] - last['histories_without_target']),
                     'events': len(train.events), 'lost': part(last['context_items_cut'], len(train.events)),
                     'windows': windows['windows']})
  return {'length': length, 'item_length': item_length,
          'vocabulary': {'fingerprint': vocabulary.fingerprint, 'size': vocabulary.vocab_size},
          'items': {'quantiles': distributions.quantiles(lengths_I), 'histogram': distributions.histogram(lengths_I),
                    'cut': part(whole.cut['items_cut'], len(lengths_I))},
          'histories': {'quantiles': distributions.quantiles(whole_H), 'histogram': distributions.histogram(whole_H)},
          'training': training, 'inference': inference}


def _inference(dataset: Histories, vocabulary: TokenizerVocabulary, table: ItemTokens, length: int, item_length: int) -> dict:
  """What inference cuts of the users' histories before their test targets."""
  prefixes = make_prefixes(vocabulary, table, max_item_tokens=item_length, max_length=length)
  contexts = [dataset.seen(user, 'test')[:-1] for user in np.flatnonzero(dataset.visible('test') > 1).tolist()]
  lost_H = np.array([len(items) - len(prefixes.newest(items)[0]) for items in contexts], np.int64)
  n_events = sum(map(len, contexts))
  return {'length': length, 'histories': len(contexts), 'cut': part((lost_H > 0).sum(), len(contexts)), 'events': n_events,
          'lost': part(lost_H.sum(), n_events)}
