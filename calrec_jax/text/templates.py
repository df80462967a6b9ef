"""How an item and a purchase history are written as text (method: Text)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from calrec_jax.errors import UserError

FIELDS = ('title', 'category', 'brand', 'price')

# The prompt pieces. An item's piece is its text with one space before it: a leading space belongs to the piece after it.
FIRST = "This is the summary of a user's purchase history. The first item bought is as follows."
NEXT = '\nThe next item bought is as follows.'

_PROMPT_PHRASE = re.compile(r'(item bought is as follows)(?:\.|\Z)', re.IGNORECASE)


def one_line(value: str) -> str:
  """Folds all white space, and takes the full stop from the prompt's own phrase: data cannot forge an item boundary."""
  return _PROMPT_PHRASE.sub(r'\1;', ' '.join(value.split()))


@dataclasses.dataclass(frozen=True)
class ItemTemplate:
  """Which attributes of an item are written, and what stands for a missing one.

  `Title: {t}. Category: {c}. Brand: {b}. Price: {p}.` with the defaults, which are the paper's.

  Attributes:
    fields: some of `FIELDS`, in the order in which they are written.
    unknown: `write` (a missing attribute is `Unknown`, as in the paper) or `skip` (it is left out; an item of which
      nothing is known keeps its first field, `Unknown`).
  """

  fields: tuple[str, ...] = FIELDS
  unknown: str = 'write'

  def __post_init__(self):
    object.__setattr__(self, 'fields', tuple(self.fields))
    if not self.fields or not set(self.fields) <= set(FIELDS) or len(set(self.fields)) < len(self.fields):
      raise UserError(f'text.fields = {self.fields}: name each field once, out of {FIELDS}.')
    if self.unknown not in ('write', 'skip'):
      raise UserError(f"text.unknown = {self.unknown!r}: choose 'write' or 'skip'.")

  def item_text(self, item: Mapping[str, str]) -> str:
    """The item's text, on one line, without a leading space. `item` maps each of `FIELDS` to a text, '' if unknown."""
    values = {field: one_line(item[field]) for field in self.fields}
    known = [field for field in self.fields if values[field] or self.unknown == 'write'] or self.fields[:1]
    return ' '.join(f'{field.capitalize()}: {values[field] or "Unknown"}.' for field in known)


def history_pieces(item_texts: Sequence[str]) -> list[str]:
  """The pieces of a history, prompt and item in turn: joined they are its text, and each is tokenized on its own."""
  pieces = []
  for index, text in enumerate(item_texts):
    pieces += [NEXT if index else FIRST, ' ' + text]
  return pieces


def text_pair(item_texts: Sequence[str]) -> tuple[str, str]:
  """(inputs, targets): the user part, up to the prompt of the last item, and that item's text (method: Text)."""
  *user, target = history_pieces(item_texts)
  return ''.join(user), target
