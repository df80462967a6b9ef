"""Charts as SVG: lines and bars that need no colour."""

import html
import math
from collections.abc import Sequence

Points = list[tuple[float, float]]

MOST_POINTS = 300
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 220, 52, 12, 26, 40
_BAR = 18  # from a bar to the next
_LETTER = 8.4  # the width of a digit, in the widest of the usual fonts
_DASHES = ('', '6 3', '2 3', '9 3 2 3', '1 5', '12 4')


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
  """Every k-th point, the last one always among them; no more than about `most`."""
  every = max(1, math.ceil(len(points) / most))
  return [point for number, point in enumerate(points) if number % every == 0 or number == len(points) - 1]


def chart(title: str, x_label: str, series: Sequence[tuple[int, str, Points]]) -> str:
  """An SVG of 320 x 220: lines that differ by dash and marker, axes with ticks and names.

  Args:
    title: what is drawn, which is the vertical axis.
    x_label: of the horizontal axis.
    series: of each line the number of its style, its name, and its points, at least one; the axis begins at 0.
  """
  xs, ys = ([point[axis] for _, _, points in series for point in points] for axis in (0, 1))
  x_ticks, y_ticks = ticks(0, max(xs), 4), ticks(min(ys), max(ys), 5)
  across = lambda x: _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _RIGHT)
  up = lambda y: _HEIGHT - _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)
  told = '; '.join(f'{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}' for _, name, points in series)
  parts = [f'<svg class="chart" role="img" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
           f'aria-label="{html.escape(f"{title} by {x_label}: {told}")}">',
           f'<text x="4" y="14">{html.escape(title)}</text>']
  for x in x_ticks:
    parts.append(f'<text x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{x:g}</text>')
  for y in y_ticks:
    parts.append(f'<path class="grid" d="M{_LEFT} {up(y):.1f}H{_WIDTH - _RIGHT}"/>'
                 f'<text x="{_LEFT - 5}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
  parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
               f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_HEIGHT - 6}" text-anchor="middle">'
               f'{html.escape(x_label)}</text>')
  for style, _, points in series:
    drawn = [(across(x), up(y)) for x, y in thinned(points)]
    parts.append(line(style, drawn))
  return ''.join([*parts, '</svg>'])


def line(style: int, drawn: Sequence[tuple[float, float]]) -> str:
  """A line through places of the picture, with at most about 8 markers."""
  dash = f' stroke-dasharray="{_DASHES[style % len(_DASHES)]}"' if style % len(_DASHES) else ''
  path = 'M' + 'L'.join(f'{x:.1f} {y:.1f}' for x, y in drawn)
  every = max(1, len(drawn) // 8)
  return f'<path class="line" d="{path}"{dash}/>' + ''.join(_marker(style, x, y) for x, y in drawn[::every])


def _marker(style: int, x: float, y: float) -> str:
  shape = ('m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0', 'm-3 -3h6v6h-6z', 'm0 -4l4 7h-8z', 'm-4 0l4 -4l4 4l-4 4z')[style % 4]
  return f'<path class="mark" d="M{x:.1f} {y:.1f}{shape}"/>'


def ticks(low: float, high: float, most: int) -> list[float]:
  """Round numbers that enclose low ... high, at least two."""
  span = (high - low) or abs(high) or 1.0
  raw = span / max(most - 1, 1)
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  last = max(last, first + 1)
  return [float(f'{number * step:.12g}') for number in range(first, last + 1)]


def bars(title: str, counts: Sequence[tuple[str, int]]) -> str:
  """An SVG: a row for each (name, count), at least one, with a bar between them; lengths begin at 0.

  It is 320 wide, or more if the names are long. A count above 0 has a bar of at least 1.
  """
  names, numbers = [name for name, _ in counts], [f'{count:,}' for _, count in counts]
  left, right = (8 + math.ceil(_LETTER * max(map(len, texts))) for texts in (names, numbers))
  width, most = max(_WIDTH, left + right + 60), max(max(count for _, count in counts), 1)
  room = width - left - right
  height = _TOP + _BAR * len(counts)
  told = '; '.join(f'{name}: {number}' for name, number in zip(names, numbers, strict=True))
  parts = [f'<svg class="chart" role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
           f'aria-label="{html.escape(f"{title}. {told}")}"><text x="4" y="14">{html.escape(title)}</text>']
  for row, (name, count) in enumerate(counts):
    middle, wide = _TOP + _BAR * (row + .5), max(room * count / most, 1 if count else 0)
    parts.append(f'<text x="{left - 6}" y="{middle + 4:g}" text-anchor="end">{html.escape(name)}</text>'
                 f'<rect class="bar" x="{left}" y="{middle - 6:g}" width="{wide:.1f}" height="12"/>'
                 f'<text x="{left + wide + 5:.1f}" y="{middle + 4:g}">{numbers[row]}</text>')
  return ''.join([*parts, f'<path class="axis" d="M{left} {_TOP}V{height}"/></svg>'])
