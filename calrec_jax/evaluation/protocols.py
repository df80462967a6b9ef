"""A protocol: all that must be the same for two results to be comparable, with a name and a hash (design: Truth)."""

import dataclasses
import hashlib
import json

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation import metrics
from calrec_jax.evaluation.baselines.popularity import train_counts

SPLITS = ('test', 'validation')
MIN_HISTORY = 3  # events: one to learn from, one for validation, one for test
NEGATIVES = 100

# What each protocol changes.
PROTOCOLS = {
  'leave_one_out_full': {'split_by': 'place in the history', 'users': 'all', 'candidates': 'all items'},
  'time_split_full': {'split_by': 'time', 'users': 'all', 'candidates': 'all items'},
  'cold_items': {'split_by': 'place in the history', 'users': 'those whose target no train part holds',
                 'candidates': 'all items'},
  'leave_one_out_sampled': {
    'split_by': 'place in the history', 'users': 'all',
    'candidates': f'the target and {NEGATIVES} other items that the user has not bought, drawn by a hash of the user id',
    'caution': 'sampled negatives: for comparison with old papers alone, as they can rank models in another order'},
}
_ORDERS = {'dump': 'that of the dump', 'hashed': 'that of a hash of user and item'}


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Who is judged, on which event, among which items.

  Attributes:
    name: one of `PROTOCOLS`.
    split: `test` or `validation`.
    seen_items: `kept`, or `filtered`: items of a user's context are no candidates, and a target among them is missed, as it
      would be for a user.
    min_history: users with fewer events are left out; at least 3.
    max_users: if set, only the first so many of the users that are left.

  Raises UserError for an option out of range.
  """

  name: str = 'leave_one_out_full'
  split: str = 'test'
  seen_items: str = 'kept'
  min_history: int = MIN_HISTORY
  max_users: int | None = None

  def __post_init__(self):
    for what, choices in (('name', PROTOCOLS), ('split', SPLITS), ('seen_items', ('kept', 'filtered'))):
      if getattr(self, what) not in choices:
        raise UserError(f'protocol: {what} = {getattr(self, what)!r}; choose one of {", ".join(choices)}.')
    for what, least in (('min_history', MIN_HISTORY), ('max_users', 1)):
      value = getattr(self, what)
      if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise UserError(f'protocol: {what} = {value!r}; give a whole number, at least {least}.')

  def rules(self, histories: Histories) -> dict:
    """All that a number depends on but the data and the method, as JSON, with a `hash` of 16 hex digits.

    Raises UserError where the data set is split in another way than the protocol asks.
    """
    if PROTOCOLS[self.name]['split_by'] != (by := 'time' if histories.cutoffs else 'place in the history'):
      raise UserError(f'protocol {self.name}: asks for a split by {PROTOCOLS[self.name]["split_by"]}, and the data set '
                      f'{histories.name} is split by {by} (--split of `calrec prepare`).')
    timed = histories.cutoffs is not None
    rules = {
      'name': self.name,
      'split': self.split,
      'target': ('the first event of the period' if timed else
                 'the last event' if self.split == 'test' else 'the event before the last'),
      'context': 'all events before the target',
      'train_part': 'all events before the validation period' if timed else 'all events but the last two',
      **PROTOCOLS[self.name],
      'seen_items': 'kept' if self.seen_items == 'kept' else 'no candidates; a target among them is missed',
      'order_at_one_time': _ORDERS.get(histories.options.get('ties'), 'as the data had it'),
      'repeats': histories.options.get('repeats', 'as the data had them'),
      'ties': 'expectation over random orders of the tied items',
      'duplicate_texts': 'items with one text are different items, tied where text alone ranks',
      'min_history': self.min_history,
      'metrics': metrics.metric_names(),
    }
    if self.max_users is not None:
      rules['users'] += f', the first {self.max_users}'
    return {**rules, 'hash': protocol_hash(rules)}

  def users(self, histories: Histories) -> tuple[list[int], int]:
    """(the numbers of the users that are judged, how many are left out because their history is too short).

    Raises UserError if nobody is left.
    """
    lengths_U, seen_U = np.diff(histories.offsets), histories.visible(self.split)
    long_enough_U = (lengths_U >= self.min_history) & (seen_U >= 2)
    users = np.flatnonzero(long_enough_U)
    if not len(users):
      raise UserError(f'data set {histories.name}: none of {len(lengths_U)} users has {self.min_history} events or more and a '
                      f'target of the {self.split} split, so there is nobody to evaluate; use a larger data set.')
    if self.name == 'cold_items':
      targets = histories.events[histories.offsets[users] + seen_U[users] - 1]
      users = users[train_counts(histories)[targets] == 0]
      if not len(users):
        raise UserError(f'data set {histories.name}: protocol cold_items: every target of the {self.split} split is an item '
                        'that a train part holds, so there is nobody to evaluate; use leave_one_out_full.')
    return users[:self.max_users].tolist(), int((~long_enough_U).sum())

  def candidates(self, histories: Histories, user: int) -> np.ndarray | None:
    """bool [I], the items that a user's target is ranked among; None: all."""
    seen = histories.seen(user, self.split)
    context, target, n_items = seen[:-1], seen[-1], len(histories.item_ids)
    if self.name == 'leave_one_out_sampled':
      others = np.setdiff1d(np.arange(n_items), seen)
      digest = hashlib.sha256(f'negatives\n{histories.user_ids[user]}'.encode()).digest()
      drawn = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], 'little'))).choice(
        others, min(NEGATIVES, len(others)), replace=False)
      allowed_I = np.zeros(n_items, bool)
      allowed_I[[*drawn, target]] = True
    elif self.seen_items == 'filtered':
      allowed_I = np.ones(n_items, bool)
      allowed_I[context] = False
    else:
      return None
    return allowed_I


def protocol_hash(rules: dict) -> str:
  """16 hex digits of the SHA-256 of the rules as canonical JSON; a `hash` among them is left out."""
  plain = {key: value for key, value in rules.items() if key != 'hash'}
  return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
