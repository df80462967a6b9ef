"""Texts of others, fit for one line of a terminal or of a page."""


def printable(text: str) -> str:
  """The text on one line, without characters that would steer a terminal."""
  return ''.join(char if char.isprintable() else '\N{REPLACEMENT CHARACTER}' for char in ' '.join(text.split()))
