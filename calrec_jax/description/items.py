"""What is counted of items: missing attributes, texts that several share, and other problems of texts."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from calrec_jax.data import cleaning, similar_ids
from calrec_jax.data.histories import FIELDS, Histories
from calrec_jax.description.purchases import item_events, part
from calrec_jax.evaluation.audit.findings import item_label
from calrec_jax.text.templates import ItemTemplate

LONG_TITLE = 200  # characters
EXAMPLES, TEXTS = 3, 5
_TAG_END = re.compile(r'/>|</[A-Za-z]')  # 'Industrial & Scientific />' is the title of 24 items of scientific2018
_MISREAD = re.compile('\N{REPLACEMENT CHARACTER}|â€|[ÃÂ][\x80-\xbf€-™]')  # UTF-8 that was read as something else, or not at all


def problems(dataset: Histories) -> list[dict]:
  """What is missing in items, or wrong with them, the most frequent first; what no item has is left out.

  Each has `problem`, `items` and `events` (of these items), both with `count` and `share`, and `examples`, the most popular
  ones. Markup is what `cleaning.clean_text` would take out of a title, or the end of a tag; no price is what
  `cleaning.clean_price` reads none in.
  """
  events_I = item_events(dataset)
  items, titles = dataset.items, [item['title'] for item in dataset.items]
  marks = {f'{field} unknown': [not item[field] for item in items] for field in FIELDS}
  marks |= {
      'all attributes unknown': [not any(item[field] for field in FIELDS) for item in items],
      'title is the id': [title == item_id for title, item_id in zip(titles, dataset.item_ids, strict=True)],
      f'title of more than {LONG_TITLE} characters': [len(title) > LONG_TITLE for title in titles],
      'title without a letter': [bool(title) and not any(map(str.isalpha, title)) for title in titles],
      'title with markup': [_has_markup(title) for title in titles],
      'title with misread characters': [bool(_MISREAD.search(title)) for title in titles],
      'price that is no price': [bool(item['price']) and not cleaning.clean_price(item['price']) for item in items],
      'id of another item but for case and blanks': similar_ids.marks(dataset.item_ids),
      'in no history': (events_I == 0).tolist()}
  found = []
  for problem, mark in marks.items():
    items_P = np.flatnonzero(mark)
    if len(items_P):
      found.append({'problem': problem, **_amount(items_P, events_I), 'examples': _examples(dataset, items_P, events_I)})
  return sorted(found, key=lambda each: -each['items']['count'])  # else as above


def _has_markup(title: str) -> bool:
  return bool(_TAG_END.search(title)) or (any(sign in title for sign in '<>{(=') and cleaning.clean_text(title) != title)


def duplicates(dataset: Histories, template: ItemTemplate) -> dict:
  """Items whose text, as the model reads it, is that of another item.

  `texts`: how many texts several items share; `items` and `events` of such items; `most`: the texts that most items share, with
  their `text`, `items`, `events`, and the `examples`.
  """
  members: dict[str, list[int]] = {}
  for number, item in enumerate(dataset.items):
    members.setdefault(template.item_text(item), []).append(number)
  shared = {text: np.array(numbers) for text, numbers in members.items() if len(numbers) > 1}
  events_I = item_events(dataset)
  most = sorted(shared.items(), key=lambda each: (-len(each[1]), -events_I[each[1]].sum()))[:TEXTS]
  return {'texts': len(shared), **_amount(np.concatenate([np.zeros(0, np.int64), *shared.values()]), events_I),
          'most': [{'text': text, 'items': len(items_P), 'events': int(events_I[items_P].sum()),
                    'examples': _examples(dataset, items_P, events_I)} for text, items_P in most]}


def _amount(items_P: np.ndarray, events_I: np.ndarray) -> dict:
  return {'items': part(len(items_P), len(events_I)), 'events': part(events_I[items_P].sum(), events_I.sum())}


def _examples(dataset: Histories, items_P: np.ndarray, events_I: np.ndarray) -> Sequence[str]:
  popular: Iterable[int] = items_P[np.argsort(-events_I[items_P], kind='stable')][:EXAMPLES].tolist()
  return [item_label(dataset, item) for item in popular]
