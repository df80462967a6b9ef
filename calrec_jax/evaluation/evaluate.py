"""Ranks the whole catalogue for each user with each method, and measures all of them alike (design: Truth)."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from calrec_jax import outputs
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import last_item, popularity, transitions
from calrec_jax.evaluation.examples import examples
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.evaluation.generations import Generation, read_generations, shares, split_of
from calrec_jax.evaluation.judging import Scorer, judge
from calrec_jax.evaluation.protocols import MIN_HISTORY, Protocol
from calrec_jax.evaluation.rankings import read_rankings
from calrec_jax.ranking import catalogue as catalogues
from calrec_jax.ranking.bm25 import LUCENE, Bm25, Bm25Options
from calrec_jax.ranking.candidates import candidate_files, read_candidates
from calrec_jax.ranking.catalogue import Catalogue
from calrec_jax.ranking.fusion import EPSILON, check_epsilon, quasi_round_robin
from calrec_jax.ranking.order import Ranked
from calrec_jax.text.templates import ItemTemplate

Oracle = Callable[[Sequence[str], Sequence[str]], np.ndarray]

# The methods in the order of the table, with their names there.
TITLES = {
  'calrec': 'CALRec',
  'constrained': 'CALRec, constrained',
  'dense': 'CALRec, dense',
  'likelihood': 'CALRec, likelihood',
  'fused': 'CALRec, fused',
  'sasrec': 'SASRec',
  'item_knn': 'Item-KNN',
  'transitions': 'Item-to-item transitions',
  'bm25_last': "BM25 of the last items' texts",
  'last_item': 'Last item',
  'recent_popularity': 'Recent popularity',
  'popularity': 'Popularity',
  'ceiling': "Ceiling (the generator's own probabilities)",
}
COLUMNS = {'recall@1': 'Recall@1', 'recall@10': 'Recall@10', 'ndcg@10': 'NDCG@10', 'mrr': 'MRR'}


def evaluate(
  *,
  histories: Histories,
  template: ItemTemplate,
  out: str | os.PathLike,
  split: str = 'test',
  protocol: str = 'leave_one_out_full',
  seen_items: str = 'kept',
  min_history: int = MIN_HISTORY,
  generations: str | os.PathLike | None = None,
  oracle: Oracle | None = None,
  bm25: Bm25Options = LUCENE,
  epsilon: float = EPSILON,
  max_users: int | None = None,
  n_examples: int = 3,
) -> dict:
  """Ranks and measures: writes the folder `out`; returns what its `metrics.json` holds, and `examples` as text, if any.

  The folder has `rankings-<method>.jsonl.gz` for each method, `metrics.json`, and, with generations, `examples.txt`. It
  appears whole or not at all. Equal inputs give equal bytes.

  Args:
    histories: the data set.
    template: how items are written: the one that the texts were generated with.
    out: a folder that does not exist yet, or is empty.
    split: `test` or `validation`; the generations must be of the same.
    protocol, seen_items, min_history, max_users: see `protocols.Protocol`.
    generations: the folder of `calrec infer` (or its file of texts); None leaves CALRec out. Each ranker whose candidates are
      there is judged too: what it did not list is below what it did, and tied.
    oracle: from the ids of a context's items and of all items to float [I], the true probabilities of the next item;
      the table's ceiling, which no method sees.
    bm25: which BM25 maps generated texts onto items.
    epsilon: weight of a text's log-probability, see `quasi_round_robin`.
    n_examples: how many users `examples.txt` shows. They are chosen by a hash of their ids, not by their results.

  Raises:
    UserError: unknown split, an option out of range, nobody to evaluate, generations broken or not of these users,
      `out` in use.
  """
  outputs.check_unused(out)
  rules = Protocol(protocol, split, seen_items, min_history, max_users)
  rules.rules(histories)  # does the data set fit?
  check_epsilon(epsilon)
  users, _ = rules.users(histories)
  catalogue = catalogues.from_histories(histories, template)
  texts_of, candidates = {}, {}
  if generations is not None:
    candidates = _candidates_of(generations, histories, users, split)
    if not candidates or _has_texts(generations):
      texts_of = _generations_of(generations, histories, users, split)

  scorers: dict[str, Scorer] = {}
  if texts_of:
    scorers['calrec'] = calrec_scorer(histories, template, texts_of, bm25=bm25, epsilon=epsilon)
  for name, ranked_of in candidates.items():
    scorers[name] = _candidate_scorer(histories, ranked_of)
  for name, baseline in (('popularity', popularity), ('last_item', last_item), ('transitions', transitions)):
    scorers[name] = baseline.scorer(histories, split)
  if oracle is not None:
    scorers['ceiling'] = _oracle_scorer(histories, split, oracle)

  with outputs.new_folder(out) as folder:
    result = {
      **judge(folder, scorers, histories, rules),
      'duplicate_texts': _duplicate_texts(catalogue, [int(histories.seen(user, split)[-1]) for user in users]),
      'ranking': {
        'text': {'fields': list(template.fields), 'unknown': template.unknown},
        'bm25': dataclasses.asdict(bm25),
        'epsilon': epsilon,
      },
    }
    if texts_of:
      judged = (texts_of[histories.user_ids[user]] for user in users)
      result['generations'] = shares(judged, frozenset(catalogue.texts))
    outputs.write_json(folder / 'metrics.json', result)
    if texts_of:
      lines = read_rankings(folder / 'rankings-calrec.jsonl.gz')
      shown = examples(histories, catalogue, texts_of, lines, split=split, n_users=n_examples)
      (folder / 'examples.txt').write_text(shown, encoding='utf-8')
      result['examples'] = shown
  return result


def calrec_scorer(
  histories: Histories, template: ItemTemplate, texts_of: Mapping[str, Generation], *, bm25: Bm25Options, epsilon: float
) -> Scorer:
  """The paper's ranker: BM25 of a user's generated texts against all items, and the quasi-round-robin of the lists."""
  index = Bm25(catalogues.indexed_texts(histories.items, template, bm25.fields), bm25)

  def scores_I(user: int) -> np.ndarray:
    generation = texts_of[histories.user_ids[user]]
    return quasi_round_robin(index.scores(generation.texts), generation.logprobs, epsilon=epsilon)

  return scores_I


def table(metrics: Mapping) -> str:
  """The result of `evaluate` as a plain-text table with 95 % intervals; a method a row, CALRec first, the ceiling last."""
  methods, intervals = metrics['methods'], metrics['intervals']
  names = [name for name in TITLES if name in methods]
  width = max(len(TITLES[name]) for name in names)
  rows = [' '.join([' ' * width, *(f'{title:<21}' for title in COLUMNS.values())]).rstrip()]
  for name in names:
    cells = (f'{methods[name][column]:.4f} [{low:.3f}, {high:.3f}]' for column in COLUMNS
             for low, high in (intervals[name][column],))
    rows.append(' '.join([f'{TITLES[name]:<{width}}', *cells]))
  rules = metrics['protocol']
  head = (f'{metrics["data"]["name"]}, {rules["split"]} split: {metrics["users"]} users, {metrics["items"]} items '
          f'(protocol {rules["name"]}, {rules["hash"]})')
  return '\n'.join([head, *rows]) + '\n'


def _oracle_scorer(histories: Histories, split: str, oracle: Oracle) -> Scorer:
  def scores_I(user: int) -> np.ndarray:
    context = histories.seen(user, split)[:-1]
    return np.asarray(oracle([histories.item_ids[item] for item in context], histories.item_ids), np.float64)

  return scores_I


def _has_texts(path: str | os.PathLike) -> bool:
  path = pathlib.Path(path)
  return path.is_file() or (path / GENERATIONS).is_file()


def _check_split(path: str | os.PathLike, split: str) -> None:
  made_for = split_of(path)
  if made_for not in (None, split):
    raise UserError(f'{path}: the texts were generated for the {made_for} split, not for {split}; set SPLIT to {made_for!r}, '
                    f'or run `calrec infer` for {split}.')


def _candidates_of(
  path: str | os.PathLike, histories: Histories, users: Sequence[int], split: str
) -> dict[str, dict[str, Ranked]]:
  """Each ranker's candidates that lie in the folder, by user; BM25's are ranked anew from the texts."""
  path = pathlib.Path(path)
  files = candidate_files(path if path.is_dir() else path.parent)
  if files:
    _check_split(path, split)
  numbers = {item_id: number for number, item_id in enumerate(histories.item_ids)}
  found = {name: read_candidates(file, numbers) for name, file in files.items() if name != 'bm25' and name in TITLES}
  for name, ranked_of in found.items():
    missing = [histories.user_ids[user] for user in users if histories.user_ids[user] not in ranked_of]
    if missing:
      raise UserError(f'{files[name]}: no candidates for {len(missing)} of the {len(users)} users to evaluate (such as '
                      f'{missing[0]!r}); finish `calrec infer` on the {split} split, or set max_users.')
  return found


def _candidate_scorer(histories: Histories, ranked_of: Mapping[str, Ranked]) -> Scorer:
  def scores_I(user: int) -> np.ndarray:
    ranked = ranked_of[histories.user_ids[user]]
    scores_I = np.full(len(histories.item_ids), ranked.scores.min(initial=0) - 1)
    scores_I[ranked.items] = ranked.scores
    return scores_I

  return scores_I


def _generations_of(
  path: str | os.PathLike, histories: Histories, users: Sequence[int], split: str
) -> dict[str, Generation]:
  """Reads generations; raises UserError unless they are for this split and data set, and of all judged users."""
  found = read_generations(path)
  _check_split(path, split)
  unknown = found.keys() - set(histories.user_ids)
  if unknown:
    raise UserError(f'{path}: {len(unknown)} of {len(found)} users are not in the data set {histories.name} (such as '
                    f'{min(unknown)!r}); evaluate on the data set that the texts were generated for.')
  missing = [histories.user_ids[user] for user in users if histories.user_ids[user] not in found]
  if missing:
    raise UserError(f'{path}: no texts for {len(missing)} of the {len(users)} users to evaluate (such as '
                    f'{missing[0]!r}); finish `calrec infer` on the {split} split (it resumes), or set max_users.')
  return found


def _duplicate_texts(catalogue: Catalogue, targets: Sequence[int]) -> dict:
  """How many texts several items have, how many items have such a text, and for how many users the target is one."""
  shared_I = catalogue.twins_I > 0
  return {
    'texts': len(np.unique(catalogue.text_ids_I[shared_I])),
    'items': int(shared_I.sum()),
    'targets': int(shared_I[list(targets)].sum()),
  }
