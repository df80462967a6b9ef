"""The users whose results a report shows in full, drawn by a hash of their ids."""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from calrec_jax.data import json_lines
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines.popularity import train_counts
from calrec_jax.evaluation.generations import Generation
from calrec_jax.printable import printable
from calrec_jax.ranking.order import id_hash

TOP, TEXTS, HISTORY = 10, 5, 20


def drawn(user_ids: Iterable[str], n_users: int) -> list[str]:
  """Those with the smallest SHA-256 of their ids: a draw that knows no result."""
  return sorted(user_ids, key=id_hash)[:n_users]


def read_rows(path: pathlib.Path, wanted: Sequence[str]) -> dict[str, dict]:
  """{user id: its line} of a rankings file, with the first `TOP` items. Raises UserError, with the line, if one is broken."""
  left, found = set(wanted), {}
  for number, line in json_lines.lines(path, progress=False):
    head, cut, _ = line.partition(b', "top": [')
    try:
      if cut and json.loads(head + b'}')['user_id'] not in left:
        continue
      row = json.loads(line)
      if row['user_id'] in left:
        top = [(str(entry['item_id']), float(entry['score'])) for entry in row['top'][:TOP]]
        if not all(math.isfinite(score) for _, score in top):
          raise ValueError
        found[row['user_id']] = {'target': str(row['target']), 'better': int(row['better']), 'tied': int(row['tied']),
                                 'top': top}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise UserError(f'{path}: line {number}: is not a line of rankings; make the folder anew with `calrec evaluate`.'
                      ) from error
  return found


def people(user_ids: Sequence[str], rows: Sequence[tuple[str, Mapping[str, dict]]],
           texts: Sequence[tuple[str, Mapping[str, Generation]]], data: Histories | None, split: str) -> list[dict]:
  """What is shown of each user, as JSON; each text is on one line, without control characters.

  Args:
    user_ids: who is shown, in this order.
    rows: of each method its title, and its lines by user id (`read_rows`).
    texts: of each run its name, and its generated texts by user id.
    data: None where the data set is not known: items have their ids alone.
    split: whose target is the truth.

  Returns:
    For each user `user`, `history` (titles, the latest `HISTORY`), `earlier` (how many more), `truth`, `cold` and `repeat`
    (None without data), `texts`: (run, [(probability, text)], how many in all), `methods`: `title`, `better`, `tied`, `hit`
    (the chance that the truth is in the top 10 is 1 in 2 or more), `top`: [(item's title, score, whether it is the truth)].
  """
  title_of, number_of, counts_I = {}, {}, None
  if data is not None:
    title_of = {item_id: printable(item['title']) for item_id, item in zip(data.item_ids, data.items, strict=True)}
    number_of, counts_I = {user_id: number for number, user_id in enumerate(data.user_ids)}, train_counts(data)
  label = lambda item_id: title_of.get(item_id) or printable(item_id)
  shown = []
  for user_id in user_ids:
    target = next(lines[user_id]['target'] for _, lines in rows)
    one = {'user': printable(user_id), 'truth': label(target), 'history': [], 'earlier': 0, 'cold': None, 'repeat': None}
    if data is not None:
      *context, last = data.seen(number_of[user_id], split).tolist()
      one |= {'history': [label(data.item_ids[item]) for item in context[-HISTORY:]], 'earlier': max(len(context) - HISTORY, 0),
              'cold': not counts_I[last], 'repeat': last in context}
    one['texts'] = [_texts(name, of_user[user_id]) for name, of_user in texts if user_id in of_user]
    one['methods'] = [_method(title, lines[user_id], target, label) for title, lines in rows]
    shown.append(one)
  return shown


def _texts(name: str, generation: Generation) -> tuple[str, list, int]:
  ranked = sorted(zip(generation.logprobs, generation.texts, strict=True), reverse=True)
  return name, [(math.exp(min(logprob, 0)), printable(text)) for logprob, text in ranked[:TEXTS]], len(ranked)


def _method(title: str, row: Mapping, target: str, label) -> dict:
  chance = min(max(TOP - row['better'], 0) / (row['tied'] + 1), 1)
  return {'title': title, 'better': row['better'], 'tied': row['tied'], 'hit': chance >= 0.5,
          'top': [(label(item_id), score, item_id == target) for item_id, score in row['top']]}
