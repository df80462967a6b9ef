"""How counts are distributed: quantiles, histograms, inequality. All exact, of whole numbers."""

from collections.abc import Iterator, Sequence

import numpy as np

PERCENTS = (10, 25, 50, 75, 90, 99)
MOST_BINS = 16  # of equal width
_MANTISSAS = ((1., 1.5, 2., 3., 5., 7.), (1., 2., 5.))  # of the bounds of bins that grow, as they fit
_MOST_GROWING = 24


def quantiles(values_N: np.ndarray) -> dict[str, float]:
  """`mean`, `min`, `p10`, … `p99`, `max` of whole numbers; {} of none.

  `p10` is the least value that a tenth of the values, or more, do not exceed.
  """
  if not len(values_N):
    return {}
  sorted_N = np.sort(values_N)
  places = {f'p{percent}': -(-percent * len(sorted_N) // 100) - 1 for percent in PERCENTS}
  return {'mean': float(values_N.mean()), 'min': int(sorted_N[0]),
          **{name: int(sorted_N[place]) for name, place in places.items()}, 'max': int(sorted_N[-1])}


def histogram(values_N: np.ndarray) -> list[dict[str, int]]:
  """How many of the whole numbers, none below 0, lie in each bin `from` … `to`, both included; [] of none.

  The bins follow each other from the least value to the greatest. They are of equal width where that tells enough, else they
  grow: 1, 2, 3 to 4, 5 to 6, 7 to 9, 10 to 14, ….
  """
  if not len(values_N):
    return []
  low, high = int(values_N.min()), int(values_N.max())
  starts_B = np.array(_starts(low, high), np.int64)
  counts_B = np.bincount(np.searchsorted(starts_B, values_N, side='right') - 1, minlength=len(starts_B))
  stops = [*(starts_B[1:] - 1).tolist(), high]
  return [{'from': max(start, low), 'to': stop, 'count': count}
          for start, stop, count in zip(starts_B.tolist(), stops, counts_B.tolist(), strict=True)]


def _starts(low: int, high: int) -> list[int]:
  """Where the bins begin, the first at `low` or before it."""
  if high - low < MOST_BINS or high < 8 * low:
    width = next(width for width in round_numbers((1, 2, 5)) if high // width - low // width < MOST_BINS)
    return list(range(low // width * width, high + 1, width))
  for mantissas in _MANTISSAS:
    starts = [0]
    for number in round_numbers(mantissas):
      if number > high:
        break
      starts.append(number)
    starts = starts[max(place for place, start in enumerate(starts) if start <= low):]
    if len(starts) <= _MOST_GROWING:
      break
  return starts


def round_numbers(mantissas: Sequence[float]) -> Iterator[int]:
  """The whole numbers among mantissa · 10^k, in their order, without end."""
  power = 1
  while True:
    yield from (int(mantissa * power) for mantissa in mantissas if mantissa * power == int(mantissa * power))
    power *= 10


def gini(counts_N: np.ndarray) -> float:
  """The Gini coefficient of counts: 0 where all are equal, near 1 where one has all; 0 of nothing."""
  n, total = len(counts_N), int(counts_N.sum())
  if not total:
    return 0.
  weighted = int((np.sort(counts_N).astype(np.int64) * np.arange(1, n + 1)).sum())
  return (2 * weighted - (n + 1) * total) / (n * total)


def top_share(counts_N: np.ndarray, percent: int) -> dict[str, float]:
  """What the greatest `percent` % of the counts (`n`, rounded up) have together (`sum`), and its `share` of all."""
  n = -(-len(counts_N) * percent // 100)
  top, total = int(np.sort(counts_N)[len(counts_N) - n:].sum()), int(counts_N.sum())
  return {'n': n, 'sum': top, 'share': top / max(total, 1)}
