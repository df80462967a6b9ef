"""What a check found, and how it is shown."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from calrec_jax.data.histories import Histories
from calrec_jax.printable import printable

SERIOUS, NOTE = 'serious', 'note'
EXAMPLES = 3
_TITLE_LETTERS = 60


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that is wrong, or worth knowing.

  Attributes:
    check: which check found it.
    severity: `serious` (results are not to be trusted), or `note`.
    message: what was found, where, and what to do.
    count: how often: of users, events or items, as the message says.
    examples: up to `EXAMPLES`, each on one line without control characters.
  """

  check: str
  severity: str
  message: str
  count: int
  examples: tuple[str, ...] = ()


def finding(check: str, severity: str, message: str, count: int, examples: Iterable[str] = ()) -> Finding:
  """A finding whose texts are printable, with the first few of its examples."""
  few = [example for example, _ in zip(examples, range(EXAMPLES), strict=False)]
  return Finding(check, severity, printable(message), int(count), tuple(map(printable, few)))


def item_label(histories: Histories, item: int) -> str:
  """An item's id and title."""
  title = printable(histories.items[item]['title'])
  cut = title if len(title) <= _TITLE_LETTERS else title[:_TITLE_LETTERS - 1] + '…'
  return f'{printable(histories.item_ids[item])} ({cut or "no title"})'


def user_label(histories: Histories, user: int) -> str:
  """`user`, and the user's id."""
  return f'user {printable(histories.user_ids[user])}'


def ordered(findings: Iterable[Finding]) -> list[Finding]:
  """Serious ones first, in the order in which they were found otherwise."""
  return sorted(findings, key=lambda each: each.severity != SERIOUS)


def as_text(result: Mapping) -> str:
  """The result of `audit` as plain text: a finding a paragraph, and a last line with totals."""
  lines = []
  for each in result['findings']:
    lines.append(f'{each["severity"].upper()}  {each["check"]}: {each["message"]}')
    lines += [f'    {example}' for example in each['examples']]
  return '\n'.join([*lines, f'{_many(result["serious"], "serious finding")}, {_many(result["notes"], "note")}: '
                            f'{printable(result["dataset"])} and {_many(len(result["audited"]), "folder")}.'])


def as_result(dataset: str, audited: Sequence[str], findings: Iterable[Finding]) -> dict:
  """The result of `audit` as JSON values: `dataset`, `audited` folders, `findings` (serious first), `serious`, `notes`."""
  listed = ordered(findings)
  serious = sum(each.severity == SERIOUS for each in listed)
  rows = [dataclasses.asdict(each) | {'examples': list(each.examples)} for each in listed]
  return {'dataset': dataset, 'audited': list(audited), 'findings': rows, 'serious': serious, 'notes': len(listed) - serious}


def _many(count: int, what: str) -> str:
  return f'{count} {what}{"" if count == 1 else "s"}'
