"""A description as tables of short texts, which a terminal and a page show alike."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

from calrec_jax.description.distributions import PERCENTS
from calrec_jax.printable import printable

_WIDTH = 120  # characters of a line of a caption
_TEXT = 100  # characters of an item's text that are shown
_COLUMNS = {'mean': 'mean', 'min': 'min', **{f'p{percent}': f'{percent} %' for percent in PERCENTS}, 'p50': 'median',
            'max': 'max'}


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells of printable text.

  Attributes:
    section: the name of the part of a page in which it stands.
    caption: its first sentence says what is in it.
    columns: their heads, the first of which may be ''.
    rows: as many cells each; the first says what the row is of.
    text_from: the number of the cell from which cells are text, which stands on the left; others are numbers.
  """

  section: str
  caption: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  text_from: int


def tables(found: Mapping) -> list[Table]:
  """The tables of what `describe.describe` found, those without rows left out."""
  tokens = found['tokens']
  made = [_sizes(found), _quantiles(found), _popularity(found['popularity']), _repeats(found), _order(found['ties'])]
  made += [] if tokens is None else [_training(tokens), _inference(tokens)]
  made += [_problems(found['problems']), _duplicates(found['duplicates']), _preparation(found['preparation'])]
  return [table for table in made if table.rows]


def _sizes(found: Mapping) -> Table:
  sizes, time = found['sizes'], found['time']
  rows = [('users', f'{sizes["users"]:,}'), ('items', f'{sizes["items"]:,}'), ('events', f'{sizes["events"]:,}'),
          ('density', f'{sizes["density"]:.3%}: {sizes["pairs"]:,} pairs of a user and an item have events'),
          ('time', 'unknown: there are no timestamps' if time is None else f'{time["first"]} to {time["last"]}'),
          ('split', found['split'].replace('_', ' ')), ('fingerprint', found['fingerprint'])]
  if any((similar := found['similar_ids']).values()):
    rows.insert(-1, ('similar ids', f'{similar["users"]:,} users and {similar["items"]:,} items have the id of another one but '
                     'for case and blanks; they count as different ones'))
  return Table('size', f'Data set {printable(found["name"])}', ('', ''), rows, 1)


def _quantiles(found: Mapping) -> Table:
  of = {'events of a history': found['length'], 'events of an item': found['popularity']}
  told = ''
  if (tokens := found['tokens']) is not None:
    of |= {'tokens of an item': tokens['items'], 'tokens of a history': tokens['histories']}
    cut = tokens['items']['cut']
    told = (f'. Tokens are those of a vocabulary of {tokens["vocabulary"]["size"]:,}. A history has its prompts, and its items '
            f'have up to {tokens["item_length"]:,} tokens: {_part(cut)} of the items are cut to that')
  rows = [(what, f'{each["quantiles"]["mean"]:,.2f}', *(f'{each["quantiles"][name]:,}' for name in _COLUMNS if name != 'mean'))
          for what, each in of.items() if each['quantiles']]
  return Table('distributions', f'Quantiles{told}.', ('', *_COLUMNS.values()), rows, len(_COLUMNS) + 1)


def _popularity(popularity: Mapping) -> Table:
  rows = [(f'{top["percent"]} %', f'{top["items"]:,}', f'{top["events"]:,}', f'{top["share"]:.1%}')
          for top in popularity['top']]
  return Table('distributions', f'The most popular items. The Gini coefficient of popularity is {popularity["gini"]:.3f}: 0 is '
               'all alike, 1 is one item alone.', ('most popular', 'items', 'their events', 'of all'), rows, 4)


def _repeats(found: Mapping) -> Table:
  repeats, ties, sizes = found['repeats'], found['ties'], found['sizes']
  row = lambda what, part, of: (what, f'{part["count"]:,}', f'{sizes[of]:,} {of}', f'{part["share"]:.1%}')
  rows = [row('events that repeat the item before', repeats['consecutive'], 'events'),
          row('events of an item that the user has bought before', repeats['any'], 'events'),
          row('users with such an event', repeats['users'], 'users'),
          row('users whose last event repeats the item before', repeats['last_consecutive'], 'users'),
          row('users whose last event is of an item bought before', repeats['last_any'], 'users')]
  if ties['events'] is not None:
    rows += [row('events of the same time as the one before', ties['events'], 'events'),
             row('users whose last two events are of one time', ties['last_two'], 'users')]
  return Table('repeats', 'Repeats, and ties in time.', ('', 'count', 'of', 'share'), rows, 4)


def _order(ties: Mapping) -> Table:
  names = {'tied': 'neighbours of one time', 'tied_last_two': "users' last two events of one time",
           'last_two': "users' last two events"}
  rows = [(name, f'{each["count"]:,}', f'{each["pairs"]:,} pairs', f'{each["share"]:.1%}') for key, name in names.items()
          if (each := ties['greater_id'][key]) is not None and each['pairs']]
  return Table('repeats', 'Pairs of different items whose later item has the greater id. Chance is 50 %; far from it the order '
               'tells of the target: see `calrec audit`.', ('', 'greater', 'of', 'share'), rows, 4)


def _training(tokens: Mapping) -> Table:
  rows = [(f'{each["length"]:,}', f'{each["cut"]["count"]:,}', f'{each["cut"]["share"]:.1%}', f'{each["lost"]["count"]:,}',
           f'{each["lost"]["share"]:.1%}', f'{each["windows"]:,}') for each in tokens['training']]
  some = tokens['training'][0]
  return Table('cut', f'Cut in training, by the length of a history in tokens. There are {some["histories"]:,} train parts '
               f'with a target, and {some["events"]:,} events in all train parts. Events are lost with '
               "rows.targets = 'last'; 'all' makes so many windows of the histories.",
               ('length', 'histories cut', 'of all', 'events lost', 'of all', 'windows'), rows, 6)


def _inference(tokens: Mapping) -> Table:
  cut = tokens['inference']
  rows = [(f'{cut["length"]:,}', f'{cut["cut"]["count"]:,}', f'{cut["cut"]["share"]:.1%}', f'{cut["lost"]["count"]:,}',
           f'{cut["lost"]["share"]:.1%}')]
  return Table('cut', f'Cut in inference, before the test target. There are {cut["histories"]:,} histories of '
               f'{cut["events"]:,} events, and {tokens["item_length"]:,} of {tokens["length"]:,} tokens are for the target.',
               ('length', 'histories cut', 'of all', 'events lost', 'of all'), rows, 5)


def _problems(problems: Sequence[Mapping]) -> Table:
  rows = [(each['problem'], f'{each["items"]["count"]:,}', f'{each["items"]["share"]:.1%}', f'{each["events"]["share"]:.1%}',
           printable(each['examples'][0])) for each in problems]
  return Table('items', 'What items lack, and what may be wrong with them. The example is the most popular.',
               ('', 'items', 'of all', 'of the events', 'such as'), rows, 4)


def _duplicates(twins: Mapping) -> Table:
  rows = [(f'{each["items"]:,}', f'{each["events"]:,}', _short(each['text'])) for each in twins['most']]
  return Table('texts', f'Texts that several items share: {twins["texts"]:,} in all, of {_part(twins["items"])} of the items '
               f'with {_part(twins["events"])} of the events. These have the most items.', ('items', 'events', 'text'), rows, 2)


def _preparation(told: Mapping) -> Table:
  counts = lambda values: ', '.join(f'{key} {value}'.replace('_', ' ') for key, value in values.items())
  rows = [(f'dropped: {step["step"]}', f'{step["events"]:,} events') for step in told.get('dropped', [])]
  if (bad := told.get('bad_lines')) and (not isinstance(bad, Mapping) or any(bad.values())):
    rows.append(('broken lines', counts(bad) if isinstance(bad, Mapping) else str(bad)))
  for name in ('metadata', 'options'):
    if told.get(name):
      rows.append((name, counts(told[name])))
  return Table('preparation', 'As dataset.json tells.', ('', ''), [tuple(map(printable, row)) for row in rows], 1)


def _part(part: Mapping) -> str:
  return f'{part["count"]:,} ({part["share"]:.1%})'


def _short(text: str) -> str:
  text = printable(text)
  return text if len(text) <= _TEXT else text[:_TEXT - 1] + '…'


def as_text(found: Mapping) -> str:
  """The tables for a terminal: each below its caption, columns aligned."""
  return '\n\n'.join(f'{textwrap.fill(table.caption, _WIDTH)}\n{_aligned(table)}' for table in tables(found))


def _aligned(table: Table) -> str:
  lines = [*([table.columns] if any(table.columns) else []), *table.rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  on_the_left = {0, *range(table.text_from, len(widths))}
  place = lambda number, cell: (cell.ljust if number in on_the_left else cell.rjust)(widths[number])
  return '\n'.join('  ' + '  '.join(place(number, cell) for number, cell in enumerate(line)).rstrip() for line in lines)
