"""The candidates that `calrec infer` wrote, read back: each user's best items by one ranker."""

import json
import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError
from calrec_jax.ranking.order import Ranked


def candidate_files(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
  """The files of a folder that `calrec infer` wrote, by ranker."""
  found = pathlib.Path(folder).glob('candidates-*.jsonl.gz')
  return {path.name.removeprefix('candidates-').removesuffix('.jsonl.gz'): path for path in sorted(found)}


def read_candidates(path: str | os.PathLike, item_numbers: Mapping[str, int]) -> dict[str, Ranked]:
  """Each user's ranking, by user id. Raises UserError for a broken line, an unknown item, or a user's second line."""
  found = {}
  for number, line in json_lines.lines(path, progress=False):
    try:
      row = json.loads(line)
      user_id, ids, scores = row['user_id'], row['item_ids'], row['scores']
      unknown = [item_id for item_id in ids if item_id not in item_numbers]
      if unknown:
        raise ValueError(f'item {unknown[0]!r} is not in the data set')
      if user_id in found or len(ids) != len(scores) or len(set(ids)) < len(ids) or not all(map(math.isfinite, scores)):
        raise ValueError('a user or an item comes twice, or the lists do not fit')
      if any(a < b for a, b in zip(scores, scores[1:], strict=False)):
        raise ValueError('the scores do not fall')
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
      what = f'{error} is missing' if isinstance(error, KeyError) else error
      raise UserError(f'{path}: line {number}: {what}; make the file anew with `calrec infer`.') from error
    found[user_id] = Ranked(np.asarray([item_numbers[item_id] for item_id in ids], np.int64), np.asarray(scores, np.float64))
  return found
