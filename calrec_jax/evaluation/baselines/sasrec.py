"""The SASRec baseline: self-attention over item ids (Kang & McAuley 2018), trained to name the next item among all.

The paper trains with one sampled negative an item; the full cross-entropy used here is what makes SASRec a strong baseline
(Klenitskiy & Vasilev 2023). Each train part is one example: every item after its first is a target. Train parts share rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines.sasrec_model import Sasrec, mean_nll
from calrec_jax.evaluation.metrics import expected_metrics

Candidates = Callable[[int], np.ndarray]

METRIC = 'ndcg@10'  # of the validation split, which decides when to stop
_SCORED_AT_ONCE = 256  # users whose scores of all items are in memory while their targets are placed


@dataclasses.dataclass(frozen=True)
class SasrecOptions:
  """The network and its training. The defaults are the best of some twenty for Scientific (2018), validation split.

  Attributes:
    dim: width of the embeddings and of all layers; a multiple of `heads`.
    layers: number of attention blocks.
    heads: attention heads of each block.
    dropout: of embeddings, attention weights and each layer's output, 0 to below 1.
    max_length: of a history: of a longer one the latest events are read. Also the length of a row, in positions.
    batch_size: rows a step. A row holds as many short histories as fit.
    learning_rate: of AdamW, constant.
    weight_decay: decoupled, times the learning rate; not on the scales of norms and on biases.
    max_epochs: passes over the train parts at most.
    patience: epochs without a better validation NDCG@10 after which training stops.
    seed: of the first parameters, dropout, and the order of histories.
  """

  dim: int = 128
  layers: int = 2
  heads: int = 2
  dropout: float = 0.4
  max_length: int = 50
  batch_size: int = 8
  learning_rate: float = 1e-3
  weight_decay: float = 2.0
  max_epochs: int = 100
  patience: int = 5
  seed: int = 0

  def __post_init__(self):
    for name in ('dim', 'layers', 'heads', 'max_length', 'batch_size', 'max_epochs', 'patience'):
      if getattr(self, name) < 1:
        raise UserError(f'sasrec {name} = {getattr(self, name)}: give at least 1.')
    for name, value, fits, range_ in (
      ('dropout', self.dropout, 0 <= self.dropout < 1, 'from 0 to below 1'),
      ('learning_rate', self.learning_rate, 0 < self.learning_rate < np.inf, 'above 0'),
      ('weight_decay', self.weight_decay, 0 <= self.weight_decay < np.inf, 'from 0 up'),
      ('seed', self.seed, 0 <= self.seed < 2**32, 'from 0 to below 2^32'),
    ):
      if not fits:
        raise UserError(f'sasrec {name} = {value}: give a number {range_}.')
    if self.dim % self.heads:
      raise UserError(f'sasrec dim = {self.dim}: not a multiple of heads = {self.heads}; change one of them.')


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained network.

  Attributes:
    options: what it was trained with.
    params: of the best epoch, numpy arrays of float32.
    epochs: an entry an epoch: `loss` (nats a target, its mean over the steps, with dropout), and the validation metrics.
    best_epoch: the number of the best one, from 0.
  """

  options: SasrecOptions
  params: dict
  epochs: list[dict[str, float]]
  best_epoch: int


@dataclasses.dataclass(frozen=True)
class Rows:
  """S slices of the events of all histories, packed into R rows of L positions.

  slices  [4 5 6] [7 8] [9]                                 L = 4
  index_RL      [[4, 5, 6, 0], [7, 8, 9, 0]]    int64, where in the events; 0 pads
  segments_RL   [[1, 1, 1, 0], [2, 2, 3, 0]]    int32, the number of the slice, from 1; 0 pads
  positions_RL  [[0, 1, 2, 0], [0, 1, 0, 0]]    int32, the place in the slice
  row_S         [0, 1, 1]                       int64, the row of each slice
  last_S        [2, 1, 2]                       int64, where in its row its last event is
  """

  index_RL: np.ndarray
  segments_RL: np.ndarray
  positions_RL: np.ndarray
  row_S: np.ndarray
  last_S: np.ndarray

  def batches(self, size: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """(which rows, and index, segments and positions of them); the last batch is filled up with rows of padding."""
    for start in range(0, len(self.index_RL), size):
      rows = slice(start, start + size)
      parts = [whole_RL[rows] for whole_RL in (self.index_RL, self.segments_RL, self.positions_RL)]
      yield rows, *(np.pad(part_BL, ((0, size - len(part_BL)), (0, 0))) for part_BL in parts)


def pack(starts_S: np.ndarray, lengths_S: np.ndarray, row_length: int) -> Rows:
  """Puts slices of events (where each starts, and its length, 1 to `row_length`) into rows, in order, each whole in one row."""
  row_S, first_S = np.zeros((2, len(lengths_S)), np.int64)
  row, used = 0, 0
  for number, length in enumerate(lengths_S.tolist()):
    if used + length > row_length:
      row, used = row + 1, 0
    row_S[number], first_S[number] = row, used
    used += length
  slice_N = np.repeat(np.arange(len(lengths_S)), lengths_S)  # of each of N events in all
  place_N = np.arange(len(slice_N)) - np.repeat(np.cumsum(lengths_S) - lengths_S, lengths_S)
  at_N = row_S[slice_N], first_S[slice_N] + place_N
  index_RL, segments_RL, positions_RL = (
    np.zeros((row + 1, row_length), dtype) for dtype in (np.int64, np.int32, np.int32))
  index_RL[at_N], segments_RL[at_N], positions_RL[at_N] = starts_S[slice_N] + place_N, slice_N + 1, place_N
  return Rows(index_RL, segments_RL, positions_RL, row_S, first_S + lengths_S - 1)


def train(histories: Histories, options: SasrecOptions = SasrecOptions(), *, candidates: Candidates | None = None,
          progress: bool = True) -> Trained:
  """Trains on the train parts, until the validation NDCG@10 has not risen for `patience` epochs; keeps the best epoch.

  The network reads no test target: one trained network serves both splits. Equal seeds, on one machine, give equal bits.

  Args:
    histories: the data set.
    options: see `SasrecOptions`.
    candidates: from a user to bool [I], the items that the validation target is ranked among; None: all.
    progress: whether to show progress on stderr.

  Raises:
    UserError: no train part has two events, no user has a validation target, or the loss is not finite.
  """
  model = _model(histories, options)
  starts_S, lengths_S = _train_slices(histories, options)
  validation = _Contexts(histories, 'validation', options, candidates)
  if not len(validation.users_S):
    raise UserError(f'data set {histories.name}: no user has a validation target, which tells SASRec when to stop; use a '
                    'larger data set.')
  rules = _optimizer(options.learning_rate, options.weight_decay)
  key = jax.random.key(options.seed, impl='rbg')
  params = _init(model, jax.random.fold_in(key, 0))
  state, step = (params, rules.init(params)), 0
  epochs, best_epoch, best = [], 0, None
  with tqdm.tqdm(range(options.max_epochs), desc='sasrec', unit=' epochs', mininterval=0.5, disable=not progress) as bar:
    for epoch in bar:
      order_S = np.random.default_rng([options.seed, epoch]).permutation(len(starts_S))
      rows, losses = pack(starts_S[order_S], lengths_S[order_S], options.max_length), []
      for _, index_BL, *where in rows.batches(options.batch_size):
        step += 1
        items_BL, labels_BL = histories.events[index_BL], histories.events[index_BL + 1]
        state, loss = _train_step(model, rules, state, jax.random.fold_in(key, step), items_BL, labels_BL, *where)
        losses.append(loss)
      loss = float(np.mean(jax.device_get(losses)))
      if not np.isfinite(loss):
        raise UserError(f'sasrec: the loss is {loss} in epoch {epoch}; lower learning_rate = {options.learning_rate}.')
      epochs.append({'loss': loss, **validation.metrics(model, state[0])})
      if best is None or epochs[-1][METRIC] > epochs[best_epoch][METRIC]:
        best_epoch, best = epoch, jax.tree.map(np.array, state[0])  # copied: the next step takes the memory
      bar.set_postfix(loss=f'{loss:.3f}', ndcg=f'{epochs[-1][METRIC]:.4f}', best=f'{epochs[best_epoch][METRIC]:.4f}')
      if epoch - best_epoch >= options.patience:
        break
  return Trained(options, best, epochs, best_epoch)


def scorer(histories: Histories, split: str, options: SasrecOptions = SasrecOptions(), *, trained: Trained | None = None,
           progress: bool = True) -> Callable[[int], np.ndarray]:
  """A function from user to float64 [I], the items' logits after all events before the target; 0 where there are none.

  Args:
    histories: the data set.
    split: `test` or `validation`.
    options: what to train with, unless `trained` is given.
    trained: the result of `train`, for both splits; None: trains first.
    progress: whether to show progress on stderr.
  """
  trained = train(histories, options, progress=progress) if trained is None else trained
  contexts = _Contexts(histories, split, trained.options)
  context_UD = np.zeros((len(histories.user_ids), trained.options.dim))
  context_UD[contexts.users_S] = contexts.vectors(_model(histories, trained.options), trained.params)
  item_ID = trained.params['items'].astype(np.float64)
  return lambda user: item_ID @ context_UD[user]


class _Contexts:
  """The contexts of a split, packed: of each user who has a target and an event before it.

  Attributes:
    users_S: int64, the users' numbers.
    targets_S: int32, the items of their targets.
  """

  def __init__(self, histories: Histories, split: str, options: SasrecOptions, candidates: Candidates | None = None):
    lengths_U = histories.visible(split) - 1
    self.users_S = np.flatnonzero(lengths_U > 0)
    ends_S = histories.offsets[self.users_S] + lengths_U[self.users_S]
    lengths_S = np.minimum(lengths_U[self.users_S], options.max_length)
    self.targets_S = histories.events[ends_S]
    self._events, self._batch_size, self._candidates = histories.events, options.batch_size, candidates
    self._rows = pack(ends_S - lengths_S, lengths_S, options.max_length)

  def vectors(self, model: Sasrec, params: dict) -> np.ndarray:
    """float32 [S, D]: what the network makes of each context, at its last event."""
    vectors_SD = np.zeros((len(self.users_S), model.dim), np.float32)
    for rows, index_BL, *where in self._rows.batches(self._batch_size):
      encoded_BLD = np.asarray(_encode(model, params, self._events[index_BL], *where))
      in_batch = slice(*np.searchsorted(self._rows.row_S, [rows.start, rows.stop]))
      vectors_SD[in_batch] = encoded_BLD[self._rows.row_S[in_batch] - rows.start, self._rows.last_S[in_batch]]
    return vectors_SD

  def metrics(self, model: Sasrec, params: dict) -> dict[str, float]:
    """The mean metrics of the users, by name, their candidates being ranked."""
    vectors_SD, n = self.vectors(model, params), len(self.users_S)
    padded_SD = np.pad(vectors_SD, ((0, -n % _SCORED_AT_ONCE), (0, 0)))
    padded_S = np.pad(self.targets_S, (0, -n % _SCORED_AT_ONCE))
    places = []
    for at in range(0, n, _SCORED_AT_ONCE):
      block = slice(at, at + _SCORED_AT_ONCE)
      places.append(_places(params['items'], padded_SD[block], padded_S[block], self._candidates_of(block)))
    better_S, tied_S = (np.concatenate(parts)[:n] for parts in zip(*jax.device_get(places), strict=True))
    return {name: float(value_S.mean()) for name, value_S in expected_metrics(better_S, tied_S).items()}

  def _candidates_of(self, block: slice) -> np.ndarray | None:
    """bool [S, I] of a block of contexts; all of what pads it."""
    if self._candidates is None:
      return None
    rows = [self._candidates(user) for user in self.users_S[block].tolist()]
    return np.stack(rows + [np.ones_like(rows[0])] * (_SCORED_AT_ONCE - len(rows)))


def _model(histories: Histories, options: SasrecOptions) -> Sasrec:
  return Sasrec(len(histories.item_ids), options.max_length, options.dim, options.layers, options.heads, options.dropout)


def _train_slices(histories: Histories, options: SasrecOptions) -> tuple[np.ndarray, np.ndarray]:
  """(starts, lengths), int64 [S]: of each train part with two events or more, the latest ones but its last: the inputs."""
  lengths_U = histories.visible('train') - 1
  users_S = np.flatnonzero(lengths_U > 0)
  if not len(users_S):
    raise UserError(f'data set {histories.name}: no train part has two events, so SASRec has nothing to learn from; use a '
                    'larger data set.')
  lengths_S = np.minimum(lengths_U[users_S], options.max_length)
  return histories.offsets[users_S] + lengths_U[users_S] - lengths_S, lengths_S


@functools.cache  # the same object for the same options, so that `_train_step` is compiled once for them
def _optimizer(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
  decayed = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ('scale', 'bias'), params)
  return optax.adamw(learning_rate, b2=0.98, weight_decay=weight_decay, mask=decayed)


@functools.partial(jax.jit, static_argnames='model')
def _init(model, key):
  """The first parameters."""
  return model.init(key, *np.zeros((3, 1, model.max_length), np.int32))['params']


@functools.partial(jax.jit, static_argnames=('model', 'rules'), donate_argnames='state')
def _train_step(model, rules, state, key, items_BL, labels_BL, segments_BL, positions_BL):
  """((params, optimizer state), loss) after one step."""
  params, moments = state

  def loss_of(params: dict) -> jax.Array:
    encoded_BLD = model.apply({'params': params}, items_BL, segments_BL, positions_BL, deterministic=False,
                              rngs={'dropout': key})
    logits_NI = encoded_BLD.reshape(-1, model.dim) @ params['items'].T
    return mean_nll(logits_NI, labels_BL.reshape(-1), segments_BL.reshape(-1) > 0)

  loss, grads = jax.value_and_grad(loss_of)(params)
  updates, moments = rules.update(grads, moments, params)
  return (optax.apply_updates(params, updates), moments), loss


@functools.partial(jax.jit, static_argnames='model')
def _encode(model, params, items_BL, segments_BL, positions_BL):
  return model.apply({'params': params}, items_BL, segments_BL, positions_BL)


@jax.jit
def _places(item_ID, vectors_SD, targets_S, candidates_SI):
  """(better, tied), int32 [S]: as `rankings.place`, of each vector's target."""
  scores_SI = vectors_SD @ item_ID.T
  if candidates_SI is not None:
    scores_SI = jnp.where(candidates_SI, scores_SI, -jnp.inf)
  target_S1 = jnp.take_along_axis(scores_SI, targets_S[:, None], axis=1)
  better_S, tied_S = (scores_SI > target_S1).sum(1), (scores_SI == target_S1).sum(1) - 1
  is_candidate_S = target_S1[:, 0] > -jnp.inf
  return jnp.where(is_candidate_S, better_S, len(item_ID) - 1), jnp.where(is_candidate_S, tied_S, 0)
