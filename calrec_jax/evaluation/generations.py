"""The generated texts that are judged: read, checked, counted."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Container, Iterable

from calrec_jax.data import json_lines
from calrec_jax.errors import UserError

NAME = 'generations.jsonl.gz'


@dataclasses.dataclass(frozen=True)
class Generation:
  """One user's texts.

  Attributes:
    texts: G item texts, without a leading space, duplicates merged; some may be empty.
    logprobs: G log-probabilities in nats, summed over a text's tokens and its end.
    finished: G flags, false where the text was cut at the longest length allowed; None if not known.
  """

  texts: list[str]
  logprobs: list[float]
  finished: list[bool] | None = None


def read_generations(path: str | os.PathLike) -> dict[str, Generation]:
  """Reads a `generations.jsonl.gz` (or the folder it is in) into a dict from user id, in the order of the lines.

  Each line is `{"user_id", "texts": [...], "logprobs": [...]}`, and may have `"finished": [...]`.

  Raises:
    UserError: the file is missing or truncated, or a line is not such an object or has a user for the second time;
      the line's number is named.
  """
  path = pathlib.Path(path)
  path = path / NAME if path.is_dir() else path
  found = {}
  for number, line in json_lines.lines(path, progress=False):
    try:
      user_id, generation = _parsed(line)
      if user_id in found:
        raise ValueError(f'user {user_id!r} has a line already')
    except (ValueError, OverflowError) as error:
      raise UserError(f'{path}: line {number}: {error}; make the file anew with `calrec infer`.') from error
    found[user_id] = generation
  return found


def split_of(path: str | os.PathLike) -> str | None:
  """The split that the texts were generated for, from the run.json beside them; None where nothing tells."""
  path = pathlib.Path(path)
  record = (path if path.is_dir() else path.parent) / 'run.json'
  try:
    return json.loads(record.read_text(encoding='utf-8'))['report']['split']
  except (OSError, ValueError, KeyError, TypeError):
    return None


def shares(generations: Iterable[Generation], texts: Container[str]) -> dict:
  """What became of the generated texts: counts and shares (0 to 1, over all users' distinct texts; None of none).

  `unfinished` texts were cut at the longest length allowed (None if the file does not say), `empty` ones have no
  visible character, and `exact_match` ones equal a text of the catalogue, letter by letter.
  """
  generations = list(generations)
  n_texts = sum(len(each.texts) for each in generations)
  share = lambda count: count / n_texts if n_texts else None
  told = all(each.finished is not None for each in generations)
  return {
    'users': len(generations),
    'texts': n_texts,
    'unfinished': share(sum(each.finished.count(False) for each in generations)) if told else None,
    'empty': share(sum(not text.strip() for each in generations for text in each.texts)),
    'exact_match': share(sum(text in texts for each in generations for text in each.texts)),
  }


def _parsed(line: bytes) -> tuple[str, Generation]:
  """One line's user and texts; ValueError says what is wrong."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'not JSON ({str(error).splitlines()[0]})') from error
  _expect(isinstance(row, dict) and isinstance(row.get('user_id'), str), 'expected an object with a text as "user_id"')
  texts, logprobs, finished = row.get('texts'), row.get('logprobs'), row.get('finished')
  _expect(_is_list(texts, str), 'expected a list of texts as "texts"')
  _expect(_is_list(logprobs, int, float), 'expected a list of numbers as "logprobs"')
  _expect(finished is None or _is_list(finished, bool), 'expected a list of true and false as "finished"')
  lengths = {len(values) for values in (texts, logprobs, finished) if values is not None}
  _expect(len(lengths) == 1, 'the lists differ in length')
  _expect(all(map(math.isfinite, logprobs)), 'a log-probability is not finite')
  return row['user_id'], Generation(texts, logprobs, finished)


def _is_list(values: object, *kinds: type) -> bool:
  return isinstance(values, list) and all(type(value) in kinds for value in values)  # no bool among numbers


def _expect(is_so: bool, problem: str) -> None:
  if not is_so:
    raise ValueError(problem)
