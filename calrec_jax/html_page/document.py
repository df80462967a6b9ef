"""A whole HTML page, and the tables in it: one file that asks nothing of the network."""

import base64
import hashlib
import html
import importlib.resources
from collections.abc import Sequence

from calrec_jax.printable import printable


def document(title: str, parts: Sequence[tuple[str, str, str]], *, style: str = '', script: str = '') -> str:
  """The page; equal arguments give equal texts.

  Args:
    title: as plain text.
    parts: (id, heading, content) of each section; the heading is HTML, and so is the content. Those without are left out.
    style: rules that follow those of all pages.
    script: JavaScript, the only one that may run.
  """
  style = importlib.resources.files(__package__).joinpath('page.css').read_text(encoding='utf-8') + style
  parts = [part for part in parts if part[2]]
  links = ''.join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in parts)
  sections = '\n'.join(f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{content}</section>'
                       for name, heading, content in parts)
  scripts = f"script-src '{_digest(script)}'; " if script else ''
  policy = f"default-src 'none'; style-src '{_digest(style)}'; {scripts}base-uri 'none'; form-action 'none'"
  return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
          f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escaped(title)}</title>\n'
          f'<style>{style}</style>\n{f"<script>{script}</script>" if script else ""}\n</head>\n<body>\n'
          '<a class="skip" href="#content">Skip to the content</a>\n'
          f'<header><h1>{escaped(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
          f'<main id="content">\n{sections}\n</main>\n</body>\n</html>\n')


def _digest(text: str) -> str:
  return 'sha256-' + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def escaped(text: object) -> str:
  """A text for HTML, in it or as an attribute: on one line, without control characters."""
  return html.escape(printable(str(text)))


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_from: int | None = None) -> str:
  """A table in a box of its own that scrolls, below its caption; cells and columns are HTML, the first of each row is its head.

  `text_from`: the number of the cell from which cells hold text, which stands on the left, as their heads do.
  """
  kind = lambda number: ' class="text"' if text_from is not None and number >= text_from else ''
  head = ''.join(f'<th scope="col"{kind(number)}>{column}</th>' for number, column in enumerate(columns))
  body = ''.join(f'<tr><th scope="row">{row[0]}</th>' + ''.join(
    f'<td{kind(number)}>{cell}</td>' for number, cell in enumerate(row[1:], start=1)) + '</tr>' for row in rows)
  label = escaped(caption.partition('. ')[0].rstrip('.'))
  return (f'<figure><figcaption>{escaped(caption)}</figcaption><div class="scroll" role="region" tabindex="0" '
          f'aria-label="{label}"><table aria-label="{label}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
          '</figure>')
