"""Recommends items for purchase histories: one checkpoint, one index, any of the rankers, filters.

  recommender = Recommender.load('runs/stage2', 'runs/index')
  recommender.recommend([['B001', 'B002']], k=10, ranker='fused', filters=Filters(exclude_seen=True))
"""

import dataclasses
import functools
import math
import os
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.inference.generate import default_max_new_tokens, forbidden_ids, padded, prefill, to_row
from calrec_jax.inference.loading import Loaded, load
from calrec_jax.inference.noise import user_keys
from calrec_jax.inference.prefixes import form_batches, make_prefixes
from calrec_jax.inference.sampling import sample
from calrec_jax.ranking import fusion
from calrec_jax.ranking.index import Index, check_fits, load_index
from calrec_jax.ranking.order import Ranked
from calrec_jax.ranking.rankers import DEFAULTS, RankerOptions, Rankers, check_names, unseen


@dataclasses.dataclass(frozen=True)
class Filters:
  """Which items may be recommended; they act inside the search.

  Attributes:
    category: the item's category, or one or more of its levels in turn ('Video Games, Nintendo DS' and 'Video Games > Nintendo
      DS' have two), case ignored.
    exclude_seen: not what is in the user's history.
    in_stock: ids of the items that may be; those that the catalogue does not have are passed over.
  """

  category: str | None = None
  exclude_seen: bool = False
  in_stock: Collection[str] | None = None


@dataclasses.dataclass(frozen=True)
class Recommendation:
  """An item for a user.

  Attributes:
    item_id, title: of the item.
    score: by the ranker; comparable for one user and ranker only.
    reason: what speaks for it: a generated text and its probability, or the item's own.
  """

  item_id: str
  title: str
  score: float
  reason: str


class Recommender:
  """One checkpoint and one index."""

  def __init__(self, loaded: Loaded, index: Index, *, options: RankerOptions = DEFAULTS, n_samples: int = 32,
               temperature: float = 0.5, top_p: float = 1.0, max_new_tokens: int | None = None, seed: int = 0,
               users_per_batch: int = 8, bucket: int = 64):
    """`n_samples` to `seed`, `users_per_batch` and `bucket`: as `inference.generate` has them."""
    check_fits(index, loaded)
    self.loaded, self.index, self._options = loaded, index, options
    self._seed, self._users_per_batch, self._bucket = seed, users_per_batch, bucket
    vocabulary, tokens = loaded.vocabulary, index.tokens
    longest = loaded.lengths['targets']
    self._prefixes = make_prefixes(vocabulary, tokens, max_item_tokens=longest, max_length=loaded.lengths['inputs'])
    self._sample = functools.partial(
        sample, loaded.decoder, loaded.by_layer, n_samples=n_samples, temperature=temperature, top_p=top_p,
        max_new_tokens=max_new_tokens or default_max_new_tokens(tokens, longest), eos_id=vocabulary.eos_id,
        forbidden=forbidden_ids(vocabulary, loaded.decoder.config.vocab_size))
    self._rankers = functools.cache(lambda name, most: Rankers(loaded, index, (name,), dataclasses.replace(
        options, **{size: max(getattr(options, size), most) for size in ('candidates', 'beam_width', 'shortlist_size')})))

  @classmethod
  def load(cls, checkpoint: str | os.PathLike, index: str | os.PathLike, **options: object) -> 'Recommender':
    """From a run's folder (or an imported model's) and an index's; `options` as above. Raises UserError if they do not fit."""
    return cls(load(checkpoint), load_index(index), **options)

  def recommend(self, histories: Sequence[Sequence[str]], k: int = 10, *, ranker: str = 'bm25', filters: Filters | None = None,
                user_ids: Sequence[str] | None = None, skip_unknown: bool = False) -> list[list[Recommendation]]:
    """The best items for each history, downwards: k of them, fewer where the filters leave fewer.

    Args:
      histories: item ids in time order, at least one each. None at all: the other arguments are checked.
      k: at most the catalogue's size.
      ranker: one of `rankers.RANKERS`.
      filters: which items may be recommended; None: all.
      user_ids: what the noise of sampling depends on; None: the history itself.
      skip_unknown: pass over items that the catalogue does not have.

    Raises:
      UserError: an unknown item, an empty history, k out of range, a filter that leaves nothing for a user.
      ValueError: not as many `user_ids` as histories.
    """
    check_names((ranker,))
    if user_ids is not None and len(user_ids) != len(histories):
      raise ValueError(f'{len(histories)} histories, but {len(user_ids)} user ids.')
    if not 1 <= k <= len(self.index.catalogue):
      raise UserError(f'top = {k}: the catalogue has {len(self.index.catalogue)} items; give 1 to so many.')
    rankers = self._rankers(ranker, k)
    numbers = [self._numbers(history, number, skip_unknown) for number, history in enumerate(histories)]
    allowed_UI = self._allowed(numbers, filters or Filters())
    ids = ['\n'.join(history) for history in histories] if user_ids is None else list(user_ids)
    kept = [self._prefixes.newest(items) for items in numbers]
    found: list[list[Recommendation]] = [[] for _ in histories]
    lengths_U = np.asarray([length for _, length in kept], np.int64)
    for chosen, length in form_batches(lengths_U, users_per_batch=self._users_per_batch, bucket=self._bucket):
      size = min(self._users_per_batch, 1 << (len(chosen) - 1).bit_length())  # few shapes are compiled
      chosen_U = np.pad(chosen, (0, size - len(chosen)), mode='edge')
      tokens_UP, lengths = padded([self._prefixes.tokens(kept[user][0]) for user in chosen_U], length)
      allowed = None if allowed_UI is None else allowed_UI[chosen_U]
      for user, row in zip(chosen, self._rank(tokens_UP, lengths, [ids[user] for user in chosen_U], rankers, allowed),
                           strict=False):
        found[user] = self._explained(*row, ranker, k, None if allowed_UI is None else allowed_UI[user])
    return found

  def _rank(self, tokens_UP: np.ndarray, lengths_U: np.ndarray, ids: Sequence[str], rankers: Rankers,
            allowed_UI: np.ndarray | None) -> list[tuple[Ranked, dict | None]]:
    """(ranking, sampled texts) of each user."""
    vocabulary = self.loaded.vocabulary
    prefix = prefill(self.loaded.decoder, self.loaded.by_layer, jnp.asarray(tokens_UP), jnp.asarray(lengths_U),
                     vocabulary.bos_id is not None)
    rows, texts = [None] * len(ids), None
    if rankers.samples:
      samples = self._sample(prefix, user_keys(self._seed, ids))
      rows = [to_row(user_id, row, samples, vocabulary) for row, user_id in enumerate(ids)]
      texts = [(row['texts'], row['logprobs']) for row in rows]
    rankings = rankers.rank(prefix, texts, allowed_UI)
    return [(ranking[rankers.names[0]], row) for ranking, row in zip(rankings, rows, strict=True)]

  def _numbers(self, history: Sequence[str], number: int, skip_unknown: bool) -> np.ndarray:
    """The history's items as numbers."""
    known = self.index.item_numbers
    unknown = [item_id for item_id in history if item_id not in known]
    if unknown and not skip_unknown:
      raise UserError(f'History {number + 1}: the catalogue has no item {unknown[0]!r}'
                      f'{f" (and {len(unknown) - 1} more of them)" if len(unknown) > 1 else ""}; correct it, or pass over '
                      'unknown items with --skip_unknown.')
    items = [known[item_id] for item_id in history if item_id in known]
    if not items:
      without = ' without its unknown items' if unknown else ''
      raise UserError(f'History {number + 1}: is empty{without}; give at least one item.')
    return np.asarray(items, np.int64)

  def _allowed(self, histories: Sequence[np.ndarray], filters: Filters) -> np.ndarray | None:
    """bool [U, I], or None where no filter is set."""
    if filters == Filters():
      return None
    allowed_I = np.ones(len(self.index.catalogue), bool)
    if filters.category is not None:
      levels = lambda category: f', {category.casefold().replace(" > ", ", ")}, '
      allowed_I &= [levels(filters.category) in levels(item['category']) for item in self.index.items]
      if not allowed_I.any():
        raise UserError(f'category = {filters.category!r}: the catalogue has no such item; write a category, or one of its '
                        'levels, as the items have it.')
    if filters.in_stock is not None:
      in_stock = set(filters.in_stock)
      allowed_I &= [item_id in in_stock for item_id in self.index.catalogue.item_ids]
    if not allowed_I.any():
      raise UserError('The filters leave no item of the catalogue; loosen them.')
    allowed_UI = np.tile(allowed_I, (len(histories), 1))
    if filters.exclude_seen:
      allowed_UI &= unseen(histories, len(allowed_I))
    nothing = np.flatnonzero(~allowed_UI.any(axis=1))
    if len(nothing):
      raise UserError(f'History {nothing[0] + 1}: the filters leave no item; loosen them.')
    return allowed_UI

  def _explained(self, ranked: Ranked, row: dict | None, ranker: str, k: int, allowed_I: np.ndarray | None
                 ) -> list[Recommendation]:
    items, scores = ranked.items[:k], ranked.scores[:k]
    if ranker == 'bm25':
      reasons = self._matches(row, items, allowed_I)
    elif ranker == 'constrained' or (ranker == 'likelihood' and not self._options.length_normalised):
      reasons = [f'its text has probability {math.exp(score):.2g}' for score in scores]
    elif ranker == 'likelihood':
      reasons = [f'its text has probability {math.exp(score):.2g} a token' for score in scores]
    else:
      reasons = [{'dense': f'cosine {score:.3f}', 'fused': 'several rankings'}[ranker] for score in scores]
    catalogue = self.index.catalogue
    return [Recommendation(catalogue.item_ids[item], self.index.items[item].get('title') or catalogue.texts[item], float(score),
                           reason) for item, score, reason in zip(items.tolist(), scores, reasons, strict=True)]

  def _matches(self, row: dict, items: np.ndarray, allowed_I: np.ndarray | None) -> list[str]:
    """The generated text that each item has its score from."""
    scores_GI = self.index.bm25.scores(row['texts'])
    if allowed_I is not None:
      scores_GI, items = scores_GI[:, allowed_I], np.searchsorted(np.flatnonzero(allowed_I), items)
    best = fusion.best_texts(scores_GI, row['logprobs'], items, epsilon=self._options.epsilon)
    return [f'{math.exp(min(row["logprobs"][text], 0)):.2g}  {row["texts"][text]}' if text >= 0 else 'no generated text matches'
            for text in best]
