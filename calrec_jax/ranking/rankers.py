"""The rankers over one catalogue and one checkpoint. What they share, such as the reading of a prefix, is done once.

  bm25         the paper's: BM25 of the sampled texts, merged by the quasi-round-robin
  constrained  beam search on the trie of item texts: every result is an item
  dense        the cosine of v_U and each item's v_T; with a weight of it, also how often the text is bought
  likelihood   the exact log-probability of shortlisted items' texts
  fused        the others' rankings as one
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.inference.constrained import beam_search, on_device
from calrec_jax.inference.likelihood import log_likelihoods
from calrec_jax.inference.loading import Loaded
from calrec_jax.models.decoding import Prefix
from calrec_jax.ranking.dense import DenseIndex
from calrec_jax.ranking.fusion import EPSILON, check_epsilon, quasi_round_robin
from calrec_jax.ranking.index import Index
from calrec_jax.ranking.order import Ranked, tie_order, top_items
from calrec_jax.ranking.purchases import log_item_shares, log_text_shares
from calrec_jax.ranking.rank_fusion import fuse, read_weights

RANKERS = ('bm25', 'constrained', 'dense', 'likelihood', 'fused')
SHORTLISTS = ('dense', 'bm25', 'all')
DUPLICATES = ('tied', 'purchases')

Texts = tuple[Sequence[str], Sequence[float]]  # a user's sampled texts, and their log-probabilities


@dataclasses.dataclass(frozen=True)
class RankerOptions:
  """How the rankers rank.

  Attributes:
    candidates: the most items of a ranking; those tied with the last are listed too (but for `bm25` at 0, where no text
      matches), more where they are a shortlist, and in `fused` all that the others list.
    epsilon: weight of a text's log-probability in the quasi-round-robin.
    beam_width: live beams of `constrained`.
    shortlist: whose best items `likelihood` scores: `dense`, `bm25`, or `all` (the whole catalogue; slow).
    shortlist_size: how many of them.
    length_normalised: `likelihood` divides by the number of tokens, the end included.
    duplicates: items of one text are `tied`; or each has, on top of the text's score, the log of its share of the text's
      `purchases` (`purchases.log_item_shares`): P(item) = P(text) · P(item | text). `bm25` ties them, whatever is set here.
    popularity: weight of the log of a text's share of all purchases (`purchases.log_text_shares`) in `dense`, which is then
      cosine + temperature · popularity · log share; 1 − `objective.sampling_correction` makes it a log-probability.
    temperature: `objective.temperature`, by which a cosine is a log-probability; `purchases` and `popularity` need it.
    fusion: a file of learned weights, or its folder (`rank_fusion`); None: reciprocal rank fusion.
  """

  candidates: int = 100
  epsilon: float = EPSILON
  beam_width: int = 32
  shortlist: str = 'dense'
  shortlist_size: int = 100
  length_normalised: bool = False
  duplicates: str = 'tied'
  popularity: float = 0.0
  temperature: float = 0.5
  fusion: str | None = None

  def __post_init__(self):
    check_epsilon(self.epsilon)
    for name in ('candidates', 'beam_width', 'shortlist_size'):
      if getattr(self, name) < 1:
        raise UserError(f'rankers.{name} = {getattr(self, name)}: give at least 1.')
    if self.shortlist not in SHORTLISTS:
      raise UserError(f'rankers.shortlist = {self.shortlist!r}: choose one of {", ".join(SHORTLISTS)}.')
    if self.duplicates not in DUPLICATES:
      raise UserError(f'rankers.duplicates = {self.duplicates!r}: choose one of {", ".join(DUPLICATES)}.')
    if not 0 <= self.popularity < np.inf:
      raise UserError(f'rankers.popularity = {self.popularity}: give a finite number, at least 0 (none).')
    if not 0 < self.temperature < np.inf:
      raise UserError(f"rankers.temperature = {self.temperature}: give the training's objective.temperature, above 0.")
    if self.length_normalised and self.duplicates == 'purchases':
      raise UserError("rankers.length_normalised: a mean over tokens is no log-probability, which duplicates = 'purchases' "
                      'adds to; leave one of them out.')


DEFAULTS = RankerOptions()


def check_names(names: Sequence[str]) -> tuple[str, ...]:
  """The names of rankers as a tuple. Raises UserError for an unknown one, one given twice, or none."""
  names = (names,) if isinstance(names, str) else tuple(names)
  unknown = [name for name in names if name not in RANKERS]
  if unknown or not names or len(set(names)) < len(names):
    raise UserError(f'rankers = {names}: name each once, out of {", ".join(RANKERS)}.')
  return names


def needed_by(names: Sequence[str], shortlist: str) -> set[str]:
  """The rankers that have to run for these: themselves, what `fused` fuses (all, where it is alone), the shortlist's."""
  found = set(RANKERS) if tuple(names) == ('fused',) else set(names)
  return found | ({shortlist} & set(RANKERS) if 'likelihood' in found else set())


def unseen(contexts: Sequence[np.ndarray], n_items: int) -> np.ndarray:
  """bool [U, I]: the items that are not in a user's context."""
  unseen_UI = np.ones((len(contexts), n_items), bool)
  for unseen_I, items in zip(unseen_UI, contexts, strict=True):
    unseen_I[items] = False
  return unseen_UI


class Rankers:
  """Ranks for users whose prefixes were read."""

  def __init__(self, loaded: Loaded, index: Index, names: Sequence[str], options: RankerOptions = DEFAULTS,
               counts_I: np.ndarray | None = None):
    """The rankings of these `names`. `counts_I`: purchases of each item, which `options` may need.

    Raises UserError where a name is unknown, or something is missing that is needed.
    """
    self.names, self.options = check_names(names), options
    self.needed = needed_by(self.names, options.shortlist)
    if 'dense' in self.needed and index.texts_TD is None:
      raise UserError('The index has no embeddings, which `dense` needs; build it with `calrec index`.')
    for name in ('duplicates', 'popularity'):
      if counts_I is None and getattr(options, name) != getattr(DEFAULTS, name):
        raise UserError(f'rankers.{name} = {getattr(options, name)!r}: no purchases are known here, but in `calrec infer`; set '
                        f'it to {getattr(DEFAULTS, name)!r}.')
    self._loaded, self._index = loaded, index
    self._log_shares_I = log_item_shares(counts_I, index.trie.texts_I) if options.duplicates == 'purchases' else None
    if 'dense' in self.needed:
      self._nearest = index.dense if not options.popularity else DenseIndex(
          index.texts_TD,
          bonus_T=options.temperature * options.popularity * log_text_shares(counts_I, index.trie.texts_I))
    self._most = max(options.candidates, options.shortlist_size if 'likelihood' in self.needed else 0)
    self._fuses = [name for name in RANKERS[:-1] if name in (RANKERS if self.names == ('fused',) else self.names)]
    self._weights = read_weights(options.fusion) if options.fusion and 'fused' in self.needed else None
    if self._weights is not None and not any(self._weights.get(name) for name in self._fuses):
      raise UserError(f'{options.fusion}: has no weight for {", ".join(self._fuses) or "no ranker"}, which are to be fused; it '
                      f'is of {", ".join(self._weights) or "none"}.')
    self._order_I = tie_order(index.catalogue.item_ids)
    place_I = np.argsort(self._order_I)
    # The items of text t, in the order of ties: items_of[starts[t]:starts[t + 1]].
    self._items_of = np.lexsort((place_I, index.trie.texts_I))
    self._starts = np.concatenate([[0], np.cumsum(np.bincount(index.trie.texts_I, minlength=index.trie.n_texts))])
    self._trie = on_device(index.trie) if 'constrained' in self.needed else None

  @property
  def samples(self) -> bool:
    """Whether sampled texts are needed."""
    return 'bm25' in self.needed

  def rank(self, prefix: Prefix, texts_U: Sequence[Texts] | None, allowed_UI: np.ndarray | None = None
           ) -> list[dict[str, Ranked]]:
    """Each user's ranking by each ranker that was asked for.

    Args:
      prefix: of the U users.
      texts_U: their sampled texts; None where no ranker needs them.
      allowed_UI: bool, the items that may be ranked; None: all.

    Raises UserError where the model's output is not finite.
    """
    if not np.isfinite(prefix.user_UD).all():
      raise UserError(f'{self._loaded.found.model_dir}: the model gives embeddings that are not finite; take another one.')
    found: dict[str, list[Ranked]] = {}
    for name in RANKERS:  # each after those that it needs
      if name in self.needed:
        found[name] = {'bm25': self._bm25, 'constrained': self._constrained, 'dense': self._dense,
                       'likelihood': self._likelihood, 'fused': self._fused}[name](prefix, texts_U, allowed_UI, found)
    return [{name: found[name][user] for name in self.names} for user in range(len(prefix.lengths_U))]

  def _bm25(self, prefix: Prefix, texts_U: Sequence[Texts], allowed_UI: np.ndarray | None, _: Mapping) -> list[Ranked]:
    rankings = []
    for user, (texts, logprobs) in enumerate(texts_U):
      allowed_I = np.ones(len(self._order_I), bool) if allowed_UI is None else allowed_UI[user]
      scores_I = np.full(len(allowed_I), -np.inf)
      # Scaled over the items that are allowed: the ranking of a shop that has no others.
      scores_GI = self._index.bm25.scores(texts)[:, slice(None) if allowed_UI is None else allowed_I]
      scores_I[allowed_I] = quasi_round_robin(scores_GI, logprobs, epsilon=self.options.epsilon)
      order_I = self._order_I[allowed_I[self._order_I]]
      best = top_items(scores_I, order_I, self._most)
      if len(best) and (last := scores_I[best[-1]]) > 0:  # at 0 may lie all that is left of the catalogue
        best = np.concatenate([best[scores_I[best] > last], order_I[scores_I[order_I] == last]])
      rankings.append(Ranked(best, scores_I[best]))
    return rankings

  def _constrained(self, prefix: Prefix, _: object, allowed_UI: np.ndarray | None, __: Mapping) -> list[Ranked]:
    k = min(self._most, self._index.trie.n_texts)
    found = beam_search(self._loaded.decoder, self._loaded.by_layer, prefix, self._trie, width=self.options.beam_width, k=k,
                        allowed_UT=self._texts(allowed_UI), eos_id=self._loaded.vocabulary.eos_id)
    return self._rankings(found.texts_UK, found.logprobs_UK, allowed_UI)

  def _dense(self, prefix: Prefix, _: object, allowed_UI: np.ndarray | None, __: Mapping) -> list[Ranked]:
    k = min(self._most, self._index.trie.n_texts)
    scores_UK, texts_UK = self._nearest.top_k(np.asarray(prefix.user_UD), k, self._texts(allowed_UI))
    return self._rankings(np.asarray(texts_UK), np.asarray(scores_UK), allowed_UI, self.options.temperature)

  def _likelihood(self, prefix: Prefix, _: object, allowed_UI: np.ndarray | None, found: Mapping[str, list[Ranked]]
                  ) -> list[Ranked]:
    trie = self._index.trie
    if self.options.shortlist == 'all':
      allowed_UT = self._texts(allowed_UI)
      texts_U = [np.arange(trie.n_texts) if allowed_UT is None else np.flatnonzero(allowed_T)
                 for allowed_T in (allowed_UT if allowed_UT is not None else prefix.lengths_U)]
    else:
      shortlists = (ranked.items[:self.options.shortlist_size] for ranked in found[self.options.shortlist])
      texts_U = [np.unique(trie.texts_I[items]) for items in shortlists]
    most = max(map(len, texts_U))
    if self.options.shortlist != 'all':
      most = max(most, min(self.options.shortlist_size, trie.n_texts))  # one shape, whatever texts are shared
    texts_UC = np.stack([np.pad(texts, (0, most - len(texts))) for texts in texts_U])
    lengths_UC = np.where(np.arange(most)[None] < np.asarray(list(map(len, texts_U)))[:, None], trie.lengths_T[texts_UC], 0)
    scores_UC = log_likelihoods(self._loaded.decoder, self._loaded.by_layer, prefix, trie.text_tokens(texts_UC), lengths_UC,
                                eos_id=self._loaded.vocabulary.eos_id)
    if self.options.length_normalised:
      scores_UC = scores_UC / (lengths_UC + 1)
    order_UC = np.argsort(-scores_UC, axis=1, kind='stable')
    texts_UC, scores_UC = (np.take_along_axis(x, order_UC, axis=1) for x in (texts_UC, scores_UC))
    return self._rankings(np.where(np.isfinite(scores_UC), texts_UC, -1), scores_UC, allowed_UI)

  def _fused(self, prefix: Prefix, _: object, __: object, found: Mapping[str, list[Ranked]]) -> list[Ranked]:
    return [fuse({name: found[name][user] for name in self._fuses}, self._weights) for user in range(len(prefix.lengths_U))]

  def _texts(self, allowed_UI: np.ndarray | None) -> np.ndarray | None:
    """bool [U, T]: the texts of which an item is allowed."""
    if allowed_UI is None:
      return None
    allowed_UT = np.zeros((len(allowed_UI), self._index.trie.n_texts), bool)
    for allowed_T, allowed_I in zip(allowed_UT, allowed_UI, strict=True):
      allowed_T[self._index.trie.texts_I[allowed_I]] = True
    return allowed_UT

  def _rankings(self, texts_UK: np.ndarray, scores_UK: np.ndarray, allowed_UI: np.ndarray | None, nat: float = 1.0
                ) -> list[Ranked]:
    """From ranked texts to ranked items, see `RankerOptions.duplicates`; a nat of log-probability is worth `nat` of a score."""
    rankings = []
    for user, (texts_K, scores_K) in enumerate(zip(texts_UK, scores_UK, strict=True)):
      kept = texts_K >= 0
      parts = [self._items_of[self._starts[text]:self._starts[text + 1]] for text in texts_K[kept]]
      if allowed_UI is not None:
        parts = [items[allowed_UI[user][items]] for items in parts]
      scores = np.repeat(scores_K[kept].astype(np.float64), list(map(len, parts)))
      items = np.concatenate([np.zeros(0, np.int64), *parts])
      if self._log_shares_I is not None:
        scores += nat * self._log_shares_I[items]
        order = np.argsort(-scores, kind='stable')
        items, scores = items[order], scores[order]
      last = min(self._most, len(items))
      most = int(np.searchsorted(-scores, -scores[last - 1], side='right')) if last else 0
      rankings.append(Ranked(items[:most], scores[:most]))
    return rankings
