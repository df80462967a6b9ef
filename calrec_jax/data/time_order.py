"""Order in time, and splits by it: what stands first where times are equal, and when the test period begins.

Days are the unit of time in many dumps, so ties are the rule. Amazon's dumps list reviews by product: events of one day lie
in the order of their item ids, and the last item, the target, tells itself by its id. A hash tells nothing.
"""

import hashlib

import numpy as np

from calrec_jax.errors import UserError

TIES = ('dump', 'hashed')
SPLITS = ('leave_one_out', 'time')
MILLISECONDS = 10**11  # from here on a time cannot be in seconds: they reach this in the year 5138
_SHARES = (0.8, 0.9)  # of the events, before the validation and the test period


def check_options(ties: str, split: str) -> None:
  """Raises UserError for a value that is not known."""
  for name, value, choices in (('ties', ties, TIES), ('split', split, SPLITS)):
    if value not in choices:
      raise UserError(f'{name} = {value!r}: choose one of {", ".join(choices)}.')


def tie_hash(user_id: str, item_id: str) -> str:
  """What `hashed` orders a user's events of one time by: 16 hex digits of the MD5 of both ids, as DuckDB computes it too."""
  return hashlib.md5(f'{user_id}\n{item_id}'.encode(), usedforsecurity=False).hexdigest()[:16]


SQL_TIE_HASH = 'substr(md5({user} || chr(10) || {item}), 1, 16)'


def cutoffs(timestamps: np.ndarray | None, name: str) -> tuple[int, int]:
  """The times at which the validation and the test period begin: 80 % and 90 % of the events lie before, or somewhat fewer.

  Args:
    timestamps: int64 [events], in any order.
    name: of the data set, for messages.

  Raises:
    UserError: no times, or the events do not lie in three periods.
  """
  if timestamps is None:
    raise UserError(f'{name}: has no timestamps, so it cannot be split by time; use --split leave_one_out.')
  times = np.sort(timestamps)
  validation, test = (int(times[int(len(times) * share)]) for share in _SHARES)
  if not times[0] < validation < test:
    raise UserError(f'{name}: the times of the events ({times[0]}, …, {validation}, …, {test}, … s) give no three periods; use '
                    '--split leave_one_out.')
  return validation, test
