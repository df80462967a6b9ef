"""Rules by which dumps become histories: what counts as an event, in which order, and which texts an item has."""

import dataclasses
import datetime
import math
import re

from calrec_jax.data import dump_formats, time_order
from calrec_jax.data.filtering import DEDUP
from calrec_jax.errors import UserError

CORES = ('iterative', 'once')
_SECOND_OF_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Rules:
  """What decides, beside the files, what a data set holds. Raises UserError for values that mean nothing.

  Attributes:
    min_count: the k of the k-core, in events; 0: no core.
    core: `iterative`, until users and items all have `min_count` events; or `once`, by their counts before.
    min_length: shorter histories are dropped and counted.
    max_bad_lines: lines of each file that may be broken: no JSON object, or one without the fields it must have.
    ties: the order of a user's events of one time: `dump`, that of the lines, as the literature has it; or `hashed`.
    split: `leave_one_out`, or `time`: see `time_order.cutoffs`.
    dedup: of a user's events with one item all stay but `consecutive` ones, or all (`none`), or the `first` alone.
    since: events from here on; seconds, or a date such as 2015-01-31, which begins at midnight UTC.
    until: events before this.
    verified_only: whether only events stay that the dump says are purchases.
    min_rating: events with at least so many stars; one without a rating has none.
    no_price: whether prices are left out.
    category_depth: levels of a category that are kept, from the broadest; None: all.
    csv_columns: the columns of a CSV without a header, such as 'item,user,rating,time'; None: told by the ids.
  """

  min_count: int = 5
  core: str = 'iterative'
  min_length: int = 3
  max_bad_lines: int = 0
  ties: str = 'dump'
  split: str = 'leave_one_out'
  dedup: str = 'consecutive'
  since: int | str | None = None
  until: int | str | None = None
  verified_only: bool = False
  min_rating: float | None = None
  no_price: bool = False
  category_depth: int | None = None
  csv_columns: str | None = None

  def __post_init__(self):
    time_order.check_options(self.ties, self.split)
    for name, value, choices in (('core', self.core, CORES), ('dedup', self.dedup, DEDUP)):
      if value not in choices:
        raise UserError(f'{name} = {value!r}: choose one of {", ".join(choices)}.')
    for name in ('since', 'until'):
      object.__setattr__(self, name, _seconds(name, getattr(self, name)))
    if self.since is not None and self.until is not None and self.since >= self.until:
      raise UserError(f'--since {self.since} is not before --until {self.until} (seconds); no event can lie between them.')
    if self.min_rating is not None and not math.isfinite(self.min_rating):
      raise UserError(f'--min_rating {self.min_rating}: is no number of stars.')
    if self.category_depth is not None and self.category_depth < 1:
      raise UserError(f'--category_depth {self.category_depth}: keep at least one level.')
    dump_formats.csv_places(self.csv_columns)

  def options(self) -> dict[str, object]:
    """What dataset.json says of them: those that are not as usual behind the six that it has always held."""
    always = {'min_count': self.min_count, 'min_length': self.min_length, 'max_bad_lines': self.max_bad_lines,
              'ties': self.ties, 'split': self.split, 'repeats': DEDUP[self.dedup]}
    more = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
            if field.name not in {*always, 'dedup'} and getattr(self, field.name) != field.default}
    return always | more

  @property
  def columns(self) -> tuple[str, ...]:
    """The columns that the reviews are read for."""
    wanted = {'rating': self.min_rating is not None, 'verified': self.verified_only}
    return tuple(column for column in dump_formats.REVIEW_COLUMNS if wanted.get(column, True))


def _seconds(name: str, value: int | str | None) -> int | None:
  """A bound in time as seconds. Raises UserError unless it is one."""
  if value is None:
    return None
  text = str(value)
  if re.fullmatch(r'\d{4}-\d{2}-\d{2}', text):
    try:
      return (datetime.date.fromisoformat(text) - datetime.date(1970, 1, 1)).days * _SECOND_OF_DAY
    except ValueError as error:
      raise UserError(f'--{name} {text}: is no day ({error}).') from error
  if re.fullmatch(r'-?\d{1,19}', text) and not re.fullmatch(r'(19|20)\d{2}|(19|20)\d{6}', text):
    if int(text) < time_order.MILLISECONDS:
      return int(text)
  raise UserError(f'--{name} {text}: write a day, such as 2015-01-31, or seconds since 1970.')
