"""Packing: pieces of several sizes into rows of fixed capacity, each row as full as its pieces allow."""

import numpy as np


def fill_rows(sizes: np.ndarray, capacity: np.ndarray, rng: np.random.Generator | None = None) -> list[np.ndarray]:
  """Packs every piece into some row.

  A row opens with the largest piece that is left, and takes the pieces that fill the rest best: a subset sum over the sizes
  that are left, as a bit set (bit s: size s can be reached). Large pieces first, so that the small ones fill the gaps.

  Args:
    sizes: int [n, c]; the first column (tokens) is packed, the others are only limits.
    capacity: int [c], of every row.
    rng: draws which of the pieces of one size is taken; None: in their own order.

  Returns:
    The rows, each an int array of piece numbers.

  Raises:
    ValueError: a piece is larger than a row.
  """
  if len(sizes) and (sizes.max(axis=0) > capacity).any():
    raise ValueError(f'A piece of {sizes.max(axis=0)} does not fit a row of {capacity}.')
  pieces = np.arange(len(sizes)) if rng is None else rng.permutation(len(sizes))
  by_size: dict[int, list[int]] = {}
  for piece, size in zip(pieces[::-1].tolist(), sizes[pieces[::-1], 0].tolist(), strict=True):
    by_size.setdefault(size, []).append(piece)
  left = sorted(by_size, reverse=True)  # the sizes that are left
  rest = sizes[:, 1:].tolist()
  rows = []
  while left:
    row, others, room = [], capacity[1:].tolist(), int(capacity[0])
    for size in [left[0], *_fullest(left, by_size, room - left[0])]:
      piece = by_size[size][-1]
      if any(need > have for need, have in zip(rest[piece], others, strict=True)):
        continue
      others = [have - need for need, have in zip(rest[piece], others, strict=True)]
      row.append(by_size[size].pop())
      if not by_size[size]:
        left.remove(size)
    rows.append(np.asarray(row))
  return rows


def _fullest(left: list[int], by_size: dict[int, list[int]], room: int) -> list[int]:
  """Sizes out of `left` (falling; the first has one piece fewer) whose sum comes closest to `room` from below."""
  within = (1 << (room + 1)) - 1
  tried, reached = [], [1]
  for size in left:
    copies = len(by_size[size]) - (size == left[0])
    if size > room:
      continue
    for _ in range(min(copies, room // size)):
      tried.append(size)
      reached.append((reached[-1] | reached[-1] << size) & within)
    if reached[-1] >> room:
      break
  total, taken = reached[-1].bit_length() - 1, []
  for size, before in zip(reversed(tried), reversed(reached[:-1]), strict=True):
    if not before >> total & 1:
      taken.append(size)
      total -= size
  return taken
