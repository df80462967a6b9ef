"""The page: a plain dict (`report.gather`) becomes HTML that needs no network, no font and, but for the search, no script."""

import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence

from calrec_jax.evaluation.evaluate import COLUMNS
from calrec_jax.evaluation.report.examples_part import examples_part
from calrec_jax.html_page import charts
from calrec_jax.html_page.document import document, escaped, table

LIST_COLUMNS = {
  'coverage@10': ('Coverage@10', 'the share of the catalogue that is in the first ten of some list'),
  'popularity@10': ('Popularity@10', 'the mean count of listed items over that of what was bought; above 1 a method prefers '
                    'what is popular more than shoppers do'),
  'repeats@10': ('Repeats@10', 'the share of listed items that the user had bought before'),
  'novelty@10': ('Novelty@10', 'the mean self-information of listed items, in bits; higher is less known'),
}
WAYS = {'history': 'items before the target', 'target popularity': "the target's events in the train parts",
        'target': 'cold: the target is in no train part', 'repeat': 'repeat: the user had bought the target before',
        'category': "the target's category", 'price': "whether the target's price is known"}


def page(found: Mapping) -> str:
  """The HTML of what `report.gather` found. Equal dicts give equal texts."""
  script = importlib.resources.files(__package__).joinpath('page.js').read_text(encoding='utf-8')
  data = found['data']
  title = f'Evaluation of {data["name"]}, {found["protocol"].get("split", "")} split' if data else 'Training runs'
  return document(title, (
    ('results', 'Results', _results(found)), ('differences', 'Differences', _differences(found['compared'])),
    ('curves', 'Training', _curves(found['curves'])), ('slices', 'Groups of users', _slices(found)),
    ('lists', 'What the lists are like', _lists(found)), ('examples', 'Examples', examples_part(found['people'])),
    ('audit', 'Audit', _audit(found['audit'])), ('protocol', 'Protocol', _protocol(found['protocol'])),
    ('origin', 'Origin', _origins(found['origins'])), ('notes', 'Notes', _notes(found['notes']))), script=script)


def _best(values: Sequence[float | None]) -> float | None:
  return max((value for value in values if value is not None), default=None)


def _number(value: object, best: object = None, digits: int = 4) -> str:
  if not isinstance(value, int | float):
    return '–'
  text = f'{value:.{digits}f}'
  return f'<strong>{text}</strong>' if value == best else text


def _results(found: Mapping) -> str:
  if not found['rows']:
    return ''
  rules, judged = found['protocol'], [row for row in found['rows'] if row['method'] != 'ceiling']
  best = {column: _best([row['metrics'].get(column) for row in judged]) for column in COLUMNS}
  rows = []
  for row in found['rows']:
    cells = [escaped(row['title'])]
    for column in COLUMNS:
      ends = row['intervals'].get(column)
      shown = _number(row['metrics'].get(column), best[column] if row['method'] != 'ceiling' else None)
      cells.append(shown + (f' <small>[{ends[0]:.3f}, {ends[1]:.3f}]</small>' if ends else ''))
    rows.append(cells)
  caution = f'<p><strong>Caution:</strong> {escaped(rules["caution"])}.</p>' if 'caution' in rules else ''
  few = (f', {found["too_short_users"]:,} left out as their history is too short' if found['too_short_users'] else '')
  caption = (f'{found["data"]["name"]}, {rules.get("split", "?")} split: {found["users"]:,} users{few}, {found["items"]:,} '
             f'items. Protocol {rules["name"]}, hash {rules["hash"]}. In brackets the 95 % interval of the mean over users; '
             'the best of each column is bold.')
  return caution + table(caption, ['Method', *COLUMNS.values()], rows)


def _differences(compared: Mapping | None) -> str:
  if not compared or not compared['differences']:
    return ''
  title_of = {row['name']: row['title'] for row in compared['methods']}
  rows = [[escaped(title_of[each['method']]),
           f'{each["difference"]:+.4f} <small>[{each["low"]:+.4f}, {each["high"]:+.4f}]</small>',
           f'{each["p_corrected"]:.4f}', '<strong>holds</strong>' if each['holds'] else 'unclear']
          for each in compared['differences']
          if each['metric'] == compared['metric'] and each['baseline'] == compared['baseline']]
  n_pairs = sum(each['metric'] == compared['metric'] for each in compared['differences'])
  return table(f'{COLUMNS.get(compared["metric"], compared["metric"])}, difference to the best, '
               f'{title_of[compared["baseline"]]}. Paired over the same users, {compared["resamples"]:,} resamples; p is '
               f'two-sided and corrected by Holm for all {n_pairs} pairs; a difference holds if it is below 0.05.',
               ['Method', 'Difference', 'p', 'Verdict'], rows, text_from=3)


def _curves(found: Sequence[Mapping]) -> str:
  if not found:
    return ''
  legend = ''.join(f'<li><svg class="chart" width="48" height="14" viewBox="0 0 48 14" aria-hidden="true">'
                   f'{charts.line(number, [(4, 7), (24, 7), (44, 7)])}</svg>{escaped(each["name"])}</li>'
                   for number, each in enumerate(found))
  drawn = []
  for by in ('step', 'epoch'):
    tags = dict.fromkeys(tag for each in found if each['by'] == by for tag in each['lines'])
    for tag in tags:
      series = [(number, each['name'], each['lines'][tag]) for number, each in enumerate(found)
                if each['by'] == by and tag in each['lines']]
      drawn.append(charts.chart(tag, by, series))
  return (f'<ul class="legend">{legend}</ul><div class="charts">{"".join(drawn)}</div><p class="note">Losses are in nats. nig: '
          'next-item generation; ut and tt: the two contrastive losses. Of long curves some points are left out.</p>')


def _slices(found: Mapping) -> str:
  parts = []
  for way, groups in found['slices'].items():
    told = WAYS.get(way, way)
    tables = []
    for metric in ('ndcg@10', 'recall@10'):
      rows = [[escaped(row['title'])] for row in found['rows']]
      for group in groups:
        values = [of_method.get(metric) for of_method in group['methods']]
        best = _best([value for value, row in zip(values, found['rows'], strict=True) if row['method'] != 'ceiling'])
        for row, value in zip(rows, values, strict=True):
          row.append(_number(value, best, 3))
      columns = ['Method', *(f'<div>{escaped(group["group"])}</div><small>{group["users"]:,} users</small>'
                             for group in groups)]
      tables.append(table(f'{COLUMNS[metric]} by {way}: {told}.', columns, rows))
    parts.append(f'<h3>{escaped(way.capitalize())}</h3>{tables[0]}<details><summary>Recall@10 by {escaped(way)}</summary>'
                 f'{tables[1]}</details>')
  return '<p class="note">The best of each group is bold. Groups of few users say little.</p>' + ''.join(parts) if parts else ''


def _lists(found: Mapping) -> str:
  if not found['rows']:
    return ''
  rows = [[escaped(row['title']), *(_number(row['lists'].get(name), digits=3) for name in LIST_COLUMNS)]
          for row in found['rows']]
  parts = []
  if any(row['lists'] for row in found['rows']):
    parts.append(table('The first ten items of all users.', ['Method', *(head for head, _ in LIST_COLUMNS.values())], rows))
    parts.append('<ul class="note">' + ''.join(f'<li>{head}: {what}.</li>' for head, what in LIST_COLUMNS.values()) + '</ul>')
  share = lambda value: '–' if value is None else f'{value:.1%}'
  if found['generations']:
    rows = [[escaped(each['run']), f'{each.get("users", 0):,}', f'{each.get("texts", 0):,}',
             *(share(each.get(name)) for name in ('exact_match', 'unfinished', 'empty'))] for each in found['generations']]
    parts.append(table('Generated texts. Exact: equal to a text of the catalogue, letter by letter; unfinished: cut at the '
                       'longest length.', ['Run', 'Users', 'Texts', 'Exact', 'Unfinished', 'Empty'], rows))
  twins = found['duplicate_texts']
  if twins:
    parts.append(f'<p class="note">{twins["items"]:,} items share their text with another ({twins["texts"]:,} texts); '
                 f'{twins["targets"]:,} users have such an item as their target.</p>')
  return ''.join(parts)


def _audit(found: Mapping | None) -> str:
  if found is None:
    return ''
  rows = ''.join(f'<li><strong>{escaped(each["severity"])}</strong>, {escaped(each["check"])}: {escaped(each["message"])}'
                 + ('<ul>' + ''.join(f'<li>{escaped(example)}</li>' for example in each['examples']) + '</ul>'
                    if each['examples'] else '') + '</li>' for each in found['findings'])
  return (f'<p>{found["serious"]} serious, {found["notes"]} to note, in the data set and {len(found["audited"])} folders.</p>'
          + (f'<ul>{rows}</ul>' if rows else ''))


def _protocol(rules: Mapping | None) -> str:
  if not rules:
    return ''
  told = lambda value: ', '.join(map(str, value)) if isinstance(value, list) else str(value)
  return '<dl class="rules">' + ''.join(f'<dt>{escaped(key.replace("_", " "))}</dt><dd>{escaped(told(value))}</dd>'
                                        for key, value in rules.items()) + '</dl>'


def _origins(found: Sequence[Mapping]) -> str:
  parts = []
  for each in found:
    versions = ', '.join(f'{name} {version}' for name, version in each['versions'].items())
    parts.append(f'<h3>{escaped(each["title"])}</h3><p>Folder: {escaped(each["folder"])}</p>')
    if each['command']:
      parts.append(f'<pre class="wrap">{escaped(each["command"])}</pre>')
    if versions:
      parts.append(f'<p class="note">Versions: {escaped(versions)}.</p>')
    if each['record']:
      text = json.dumps(each['record'], indent=2, ensure_ascii=False)
      parts.append(f'<details><summary>Record: data fingerprints, seeds, and more</summary>{_box("Record of", each, text)}'
                   '</details>')
    if each['gin'].strip():
      parts.append(f'<details><summary>Gin configuration</summary>{_box("Configuration of", each, each["gin"])}</details>')
  return ''.join(parts)


def _box(kind: str, origin: Mapping, text: str) -> str:
  """Lines in a box of its own that scrolls, by keyboard too."""
  lines = '\n'.join(escaped_line(line) for line in text.split('\n'))
  return f'<pre role="region" tabindex="0" aria-label="{kind} {escaped(origin["title"])}">{lines}</pre>'


def escaped_line(text: str) -> str:
  """As `escaped`, with the spaces as they are."""
  return html.escape(''.join(char if char.isprintable() else '\N{REPLACEMENT CHARACTER}' for char in text))


def _notes(notes: Sequence[str]) -> str:
  return '<ul>' + ''.join(f'<li>{escaped(note)}</li>' for note in notes) + '</ul>' if notes else ''
