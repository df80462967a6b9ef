"""What a data set holds, counted and printed."""

from collections import Counter

import numpy as np

FIELDS = ('title', 'category', 'brand', 'price')


def statistics(items: list[dict[str, str]], offsets: np.ndarray, events: np.ndarray) -> dict:
  """Counts over a data set.

  Args:
    items: I items, at least one; each maps `FIELDS` to a text, '' if unknown.
    offsets: int64 [U + 1], U at least one: where each history begins and ends in `events`.
    events: int32 [offsets[-1]], item indices.

  Returns:
    Users, items, events; the length of histories in events; for each attribute the share of items that lack it; how
    many items share all their texts with another one; the share of histories whose last item repeats the one before.
  """
  lengths = np.diff(offsets)
  texts = [tuple(item[field] for field in FIELDS) for item in items]
  n_with_text = Counter(texts)
  ends = offsets[1:][lengths > 1]
  return {
      'users': len(lengths),
      'items': len(items),
      'events': len(events),
      'length': {'mean': _rounded(lengths.mean()), 'min': int(lengths.min()), 'max': int(lengths.max())},
      'unknown': {field: _rounded(sum(not item[field] for item in items) / len(items)) for field in FIELDS},
      'items_with_duplicate_text': sum(n_with_text[text] > 1 for text in texts),
      'last_repeats_previous': _rounded((events[ends - 1] == events[ends - 2]).sum() / len(lengths)),
  }


def _rounded(value: float) -> float:
  return round(float(value), 4)


def format_description(description: dict) -> str:
  """A description (as in `dataset.json`) for people: what was read, dropped and why, and what is left."""
  rows = [f'Data set {description["name"]}', '', 'Read']
  rows += [f'  {source["file"]:40} {source["lines"]:>12,} lines   sha256 {source["sha256"][:12]}{_format_source(source)}'
           for source in description['sources']]
  rows += ['', f'{"Step":36} {"dropped":>12} {"events":>12} {"users":>12} {"items":>12}']
  for step in description['steps']:
    counts = ' '.join(f'{step[what]:>12,}' for what in ('dropped', 'events', 'users', 'items'))
    rows.append(f'  {step["step"]:34} {counts}')
  if 'columns' in description:
    times = description['times']
    rows += [f'  columns: {", ".join(f"{what} {column}" for what, column in description["columns"].items())}',
             f'  times: {times["unit"]}, from {times["first"]} to {times["last"]} UTC']
  for what, count in description.get('metadata', {}).items():
    rows.append(f'  metadata: {what.replace("_", " ")}: {count:,}')
  rows += [f'  {count:,} {what} differ from another one only by case or blanks in the id; they are taken for different ones'
           for what, count in description.get('similar_ids', {}).items() if count]
  return '\n'.join(rows + [''] + _format_statistics(description['statistics'])
                   + [f'Options: {", ".join(f"{key} {value}" for key, value in description["options"].items())}',
                      f'Fingerprint: {description["fingerprint"]}'])


def format_descriptions(descriptions: list[dict]) -> str:
  """Several data sets for people, a line each."""
  rows = [f'{"Data set":32} {"users":>12} {"items":>12} {"events":>12} {"no title":>9}  fingerprint']
  for description in descriptions:
    stats = description['statistics']
    counts = ' '.join(f'{stats[what]:>12,}' for what in ('users', 'items', 'events'))
    rows.append(f'{description["name"]:32} {counts} {stats["unknown"]["title"]:>9.1%}  {description["fingerprint"][:12]}')
  return '\n'.join(rows)


def _format_source(source: dict) -> str:
  told = [source.get('format'), 'times in milliseconds' if source.get('time') == 'milliseconds' else None]
  return ''.join(f', {what}' for what in told if what)


def _format_statistics(stats: dict) -> list[str]:
  length = stats['length']
  unknown = ', '.join(f'{field} {share:.1%}' for field, share in stats['unknown'].items())
  return [f'{stats["users"]:,} users, {stats["items"]:,} items, {stats["events"]:,} events',
          f'History length: mean {length["mean"]:.2f}, {length["min"]} to {length["max"]} events',
          f'Unknown: {unknown}',
          f'Items with the text of another item: {stats["items_with_duplicate_text"]:,}',
          f'Last item repeats the one before: {stats["last_repeats_previous"]:.1%} of the histories']
