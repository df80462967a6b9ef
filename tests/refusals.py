"""What a refusal of the project looks like: one line of a UserError."""

import pytest

from calrec_jax.errors import UserError


def refused(call, *words):
  """The call raises a UserError of one line that has these words."""
  with pytest.raises(UserError) as caught:
    call()
  assert '\n' not in str(caught.value)
  for word in words:
    assert word in str(caught.value)
