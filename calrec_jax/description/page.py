"""A description as one HTML file: the tables, and charts of the distributions."""

import importlib.resources
import os
from collections.abc import Mapping, Sequence

from calrec_jax import outputs
from calrec_jax.description.tables import tables
from calrec_jax.html_page import charts
from calrec_jax.html_page.document import document, escaped, table

SECTIONS = {'size': 'Size', 'distributions': 'Distributions', 'repeats': 'Repeats and order', 'cut': 'What a context cuts',
            'items': 'Items', 'texts': 'Shared texts', 'preparation': 'Preparation'}


def write(found: Mapping, out: str | os.PathLike) -> None:
  """Writes the page, whole or not at all; equal descriptions give equal bytes. Raises UserError if it cannot be written."""
  outputs.write_page(out, page(found))


def page(found: Mapping) -> str:
  """The HTML of what `describe.describe` found; it has all that `tables.as_text` shows."""
  drawn = {'size': _periods(found['time']), 'distributions': _distributions(found)}
  made = tables(found)
  parts = []
  for section, heading in SECTIONS.items():
    shown = [table(each.caption, list(map(escaped, each.columns)), [list(map(escaped, row)) for row in each.rows],
                   text_from=each.text_from) for each in made if each.section == section]
    parts.append((section, heading, ''.join(shown) + drawn.get(section, '')))
  style = importlib.resources.files(__package__).joinpath('page.css').read_text(encoding='utf-8')
  return document(f'Data set {found["name"]}', parts, style=style)


def _periods(time: Mapping | None) -> str:
  return '' if time is None else _row([charts.bars('events by time', _bins(time['periods'], ''))])


def _distributions(found: Mapping) -> str:
  of = {'histories by events': found['length'], 'items by events': found['popularity']}
  if found['tokens'] is not None:
    of |= {'items by tokens': found['tokens']['items'], 'histories by tokens': found['tokens']['histories']}
  drawn = [charts.bars(title, _bins(each['histogram'], ',')) for title, each in of.items() if each['histogram']]
  shares = [(0, 0), *((top['percent'], 100 * top['share']) for top in found['popularity']['top']), (100, 100)]
  drawn.append(charts.chart('% of the events', '% of the items, the most popular first', [(0, 'events', shares)]))
  return _row(drawn)


def _bins(histogram: Sequence[Mapping], form: str) -> list[tuple[str, int]]:
  return [(f'{each["from"]:{form}}' if each['from'] == each['to'] else f'{each["from"]:{form}}–{each["to"]:{form}}',
           each['count']) for each in histogram]


def _row(drawn: Sequence[str]) -> str:
  return f'<div class="charts">{"".join(drawn)}</div>'
