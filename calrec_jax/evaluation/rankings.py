"""Where each user's target stands among all items, and who is at the top: one file a method."""

import contextlib
import gzip
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from calrec_jax.ranking.order import tie_order, top_items

TOP = 100


def place(scores_I: np.ndarray, target: int, candidates_I: np.ndarray | None = None) -> tuple[int, int]:
  """(better, tied): how many items score strictly above the target, and how many others score exactly the same.

  `candidates_I`: bool, the items that are counted; None: all. A target that is none of them comes after all items.
  """
  if candidates_I is not None and not candidates_I[target]:
    return len(scores_I) - 1, 0
  score = scores_I[target]
  if candidates_I is not None:
    scores_I = scores_I[candidates_I]
  return int(np.count_nonzero(scores_I > score)), int(np.count_nonzero(scores_I == score)) - 1


@contextlib.contextmanager
def gzip_writer(path: pathlib.Path) -> Iterator[io.TextIOBase]:
  """A text file to write, gzipped without name and time: equal lines give equal bytes."""
  with (
    open(path, 'wb') as raw,
    gzip.GzipFile('', 'wb', compresslevel=4, fileobj=raw, mtime=0) as packed,
    io.TextIOWrapper(packed, encoding='utf-8', newline='\n') as file,
  ):
    yield file


def write_rankings(
  path: pathlib.Path,
  scorer: Callable[[int], np.ndarray],
  *,
  users: Sequence[int],
  user_ids: Sequence[str],
  targets: Sequence[int],
  item_ids: Sequence[str],
  candidates: Callable[[int], np.ndarray | None] = lambda user: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Ranks the candidates of each user, and writes a line a user.

  `{"user_id", "target": item id, "better", "tied", "top": [{"item_id", "score"}, ... 100]}`.

  Args:
    path: written in place: give a path in a scratch folder.
    scorer: from a user's number to float64 [I], finite.
    users: the numbers of the users to rank, in the order of the lines; an iterable with progress is welcome.
    user_ids: ids of all users.
    targets: item index of each of `users`.
    item_ids: ids of all items.
    candidates: from a user's number to bool [I], the items that are ranked; None: all.

  Returns:
    (better_U, tied_U, tops_UK), int64, in the order of `users`; the last has the first items of each, -1 where there are fewer.
  """
  order_I = tie_order(item_ids)
  id_json = [json.dumps(item_id, ensure_ascii=False) for item_id in item_ids]
  places, tops = [], []
  with gzip_writer(path) as file:
    for user, target in zip(users, targets, strict=True):
      scores_I = scorer(user)
      if scores_I.shape != order_I.shape or not np.isfinite(scores_I).all():
        raise ValueError(f'{path.stem}: expected {len(item_ids)} finite scores for user {user_ids[user]!r}.')
      candidates_I = candidates(user)
      better, tied = place(scores_I, target, candidates_I)
      places.append((better, tied))
      best = top_items(scores_I, order_I if candidates_I is None else order_I[candidates_I[order_I]], TOP)
      tops.append(np.pad(best, (0, TOP - len(best)), constant_values=-1))
      pairs = zip(best.tolist(), scores_I[best].tolist(), strict=True)
      top = ', '.join(f'{{"item_id": {id_json[item]}, "score": {score!r}}}' for item, score in pairs)
      head = json.dumps({'user_id': user_ids[user], 'target': item_ids[target], 'better': better, 'tied': tied},
                        ensure_ascii=False)
      file.write(f'{head[:-1]}, "top": [{top}]}}\n')
  better_U, tied_U = np.array(places, np.int64).reshape(-1, 2).T
  return better_U, tied_U, np.stack(tops) if tops else np.zeros((0, TOP), np.int64)


def read_rankings(path: pathlib.Path) -> Iterator[dict]:
  """The lines of a rankings file."""
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    yield from map(json.loads, file)
