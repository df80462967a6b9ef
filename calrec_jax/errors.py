"""The one exception that a user's input may raise."""


class UserError(Exception):
  """Bad input, told in one clear line: what is wrong, where, and what to do.

  The command line prints the message without a traceback and exits with code 2. Bugs raise anything else, and keep
  their traceback.
  """
