"""A protocol: all that must be the same for two results to be comparable, with a name and a hash (design: Truth)."""

import hashlib
import json

from calrec_jax.errors import UserError
from calrec_jax.evaluation import metrics

SPLITS = ('test', 'validation')
MIN_HISTORY = 3  # events: one to learn from, one for validation, one for test


def protocol(name: str = 'leave_one_out_full', *, split: str = 'test', max_users: int | None = None) -> dict:
  """The rules of an evaluation, as JSON: `name`, the rules, and `hash` over name and rules (16 hex digits).

  Args:
    name: `leave_one_out_full` is the one there is.
    split: `test` (the target is a history's last event) or `validation` (the one before it; the last is not seen).
    max_users: if set, only the first so many users of the histories, among those that are long enough.

  Raises:
    UserError: an unknown name or split, or `max_users` below 1.
  """
  if name != 'leave_one_out_full':
    raise UserError(f"protocol = {name!r}: not known; the one there is is 'leave_one_out_full'.")
  if split not in SPLITS:
    raise UserError(f'split = {split!r}: choose one of {", ".join(SPLITS)}.')
  if max_users is not None and max_users < 1:
    raise UserError(f'max_users = {max_users}: give at least 1, or None for all.')
  rules = {
    'name': name,
    'split': split,
    'target': 'the last event' if split == 'test' else 'the event before the last',
    'context': 'all events before the target',
    'train_part': 'all events but the last two',
    'candidates': 'all items',
    'seen_items': 'kept',
    'ties': 'expectation over random orders of the tied items',
    'duplicate_texts': 'items with one text are different items, tied',
    'min_history': MIN_HISTORY,
    'users': 'all' if max_users is None else f'the first {max_users}',
    'metrics': metrics.metric_names(),
  }
  return {**rules, 'hash': protocol_hash(rules)}


def protocol_hash(rules: dict) -> str:
  """16 hex digits of the SHA-256 of the rules as canonical JSON; a `hash` among them is left out."""
  plain = {key: value for key, value in rules.items() if key != 'hash'}
  return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
