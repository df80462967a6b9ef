"""Some users in full, for the eye: history, generated texts, top items, truth."""

import math
from collections.abc import Iterable, Mapping

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.generations import Generation
from calrec_jax.printable import printable
from calrec_jax.ranking.catalogue import Catalogue
from calrec_jax.ranking.order import id_hash


def examples(
  histories: Histories,
  catalogue: Catalogue,
  texts_of: Mapping[str, Generation],
  lines: Iterable[Mapping],
  *,
  split: str,
  n_users: int = 3,
  n_texts: int = 5,
  n_items: int = 5,
) -> str:
  """Plain text about `n_users` users, those whose ids have the smallest SHA-256: a draw that knows no result.

  Args:
    histories: the data set.
    catalogue: its items, in the same order.
    texts_of: each user's generated texts.
    lines: CALRec's rankings, as in `rankings-calrec.jsonl.gz`.
    split: `test` or `validation`.
    n_users: how many users.
    n_texts: how many generated texts of each, the most probable first.
    n_items: how many items of the top, and of the history's end.
  """
  number_of = {user_id: user for user, user_id in enumerate(histories.user_ids)}
  title_of = dict(zip(catalogue.item_ids, map(_title, histories.items, catalogue.texts), strict=True))
  drawn = sorted(lines, key=lambda line: id_hash(line['user_id']))[:n_users]
  blocks = []
  for line in drawn:
    context = [histories.item_ids[item] for item in histories.seen(number_of[line['user_id']], split)[:-1]]
    n_earlier = max(len(context) - n_items, 0)
    generation = texts_of[line['user_id']]
    ranked = sorted(zip(generation.logprobs, generation.texts, strict=True), reverse=True)
    blocks.append('\n'.join([
      f'User {printable(line["user_id"])}',
      f'  history ({len(context)} items, oldest first)',
      *([f'    ... {n_earlier} earlier'] if n_earlier else []),
      *(f'    {title_of[item_id]}' for item_id in context[n_earlier:]),
      f'  generated texts ({min(n_texts, len(ranked))} of {len(ranked)}, with their probability)',
      *(f'    {math.exp(min(logprob, 0)):8.2g}  {printable(text) or "(empty)"}' for logprob, text in ranked[:n_texts]),
      f'  top {min(n_items, len(line["top"]))} items (score)',
      *(f'    {entry["score"]:8.4f}  {title_of[entry["item_id"]]}' for entry in line['top'][:n_items]),
      f'  truth (rank {_rank(line["better"], line["tied"])} of {len(catalogue)})',
      f'    {title_of[line["target"]]}',
    ]))
  return '\n\n'.join(blocks) + '\n' if blocks else ''


def _title(item: Mapping[str, str], text: str) -> str:
  """What to call an item: its title, or its whole text where that is unknown."""
  return printable(item['title']) or printable(text)


def _rank(better: int, tied: int) -> str:
  return f'{better + 1} to {better + tied + 1}, tied,' if tied else str(better + 1)
