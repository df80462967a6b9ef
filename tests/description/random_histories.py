"""Random data sets: few users and items, with repeats, ties in time, missing and equal texts, and empty histories."""

import numpy as np
from hypothesis import strategies as st

from calrec_jax.data.histories import FIELDS, Histories

TEXTS = ['', '', 'a b', 'a <b>b</b>', 'x' * 201, '1999', 'item 1', 'Ã©tÃ©', '$5.00', '<script>alert(1)</script>', 'a\u202eb']


@st.composite
def data_sets(draw, *, timed: bool | None = None, least: int = 0) -> Histories:
  """`timed`: whether there are timestamps; None: either. `least`: events of a history."""
  n_items = draw(st.integers(1, 7))
  histories = draw(st.lists(st.lists(st.integers(0, n_items - 1), min_size=least, max_size=8), min_size=1, max_size=7))
  ids = draw(st.lists(st.sampled_from([*(f'item {number}' for number in range(12)), 'é', '<i>']), min_size=n_items,
                      max_size=n_items, unique=True))
  items = [{field: draw(st.sampled_from(TEXTS)) for field in FIELDS} for _ in ids]
  times = None
  if timed if timed is not None else draw(st.booleans()):
    lowest, step = draw(st.integers(-10**9, 2 * 10**9)), draw(st.sampled_from([1, 86_400, 10**6, 10**8, 10**10]))
    times = np.array([lowest + step * time for history in histories for time in sorted(
        draw(st.lists(st.integers(0, 4), min_size=len(history), max_size=len(history))))], np.int64)
  return Histories('random', [f'user {number}' for number in range(len(histories))], ids, items,
                   np.cumsum([0, *map(len, histories)], dtype=np.int64),
                   np.array([item for history in histories for item in history], np.int32), times)


def rows(data: Histories) -> list[list[int]]:
  """Each history as a list."""
  return [data.history(user).tolist() for user in range(len(data.user_ids))]
