"""Ids that are another one's but for case and blanks: they count as different ones, and are often one by mistake."""

import re
from collections import Counter
from collections.abc import Sequence

_BLANK = re.compile(r'[\t\n\f\r ]')  # what `filtering.similar_ids` takes for one


def marks(ids: Sequence[str]) -> list[bool]:
  """Of each of some distinct ids, whether another one differs from it by case and blanks alone."""
  plain = [_BLANK.sub('', text.lower()) for text in ids]
  counts = Counter(plain)
  return [counts[text] > 1 for text in plain]


def counts(user_ids: Sequence[str], item_ids: Sequence[str]) -> dict[str, int]:
  """How many `users` and `items` have such an id."""
  return {'users': sum(marks(user_ids)), 'items': sum(marks(item_ids))}
