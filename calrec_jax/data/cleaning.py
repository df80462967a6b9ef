"""Item attributes as shops publish them become one line of plain text each."""

import html
import html.entities
import re
from collections.abc import Iterable

# Only entities that end in a semicolon: html.unescape also reads 'Cats&notes' as 'Cats¬es'. However often it was escaped.
_ENTITY = re.compile(r'&(?:amp;|#38;)*(#\d{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]{1,31};)')
# Control and direction characters, invisible spaces, halves of surrogate pairs; white space is folded elsewhere.
_UNPRINTABLE = re.compile('[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff'
                          '\ud800-\udfff]')

_TAG_NAMES = ('a|abbr|b|big|blockquote|body|br|button|center|code|dd|div|dl|dt|em|font|form|h[1-6]|head|hr|html|i|'
              'iframe|img|input|label|li|link|meta|noscript|ol|option|p|pre|script|select|small|span|strike|strong|'
              'style|sub|sup|table|tbody|td|textarea|th|thead|title|tr|tt|u|ul')
_BLOCK = re.compile(r'<(script|style)\b.*?(?:</\1\s*>|$)', re.IGNORECASE | re.DOTALL)
_COMMENT = re.compile(r'<!--.*?(?:-->|$)', re.DOTALL)
_TAG = re.compile(rf'</?(?:{_TAG_NAMES})(?:\s[^<>]*)?/?>', re.IGNORECASE)
# Tags that were cut off: one that opens the text, or one that has an attribute, so that 'less <b' in prose stays.
_OPENING_TAG = re.compile(rf'</?(?:{_TAG_NAMES})(?:\s[^<>]*)?', re.IGNORECASE)
_TAG_WITH_ATTRIBUTE = re.compile(rf'<(?:{_TAG_NAMES})\s[^<>=]*=[^<>]*', re.IGNORECASE)
# What is left of tags whose heads were cut off, such as ' Magazines" />'.
_TAG_REST = re.compile(r'^(?:[^<>]*["\']\s*/>)+')
_CODE = re.compile(r'\bfunction\s*\w*\s*\(|\bgetTime\(|\bdocument\.(?:get|write|cookie)|\bwindow\.(?:on|location|ue)|'
                   r'\bvar\s+\w+\s*=|\{\s*[a-z-]+\s*:\s*[^{}]+\}')

_AMOUNT = r'(?:[A-Z]{2,3}\s?)?[$£€¥₹]?\s?\d{1,3}(?:,?\d{3})*(?:\.\d{1,2})?'
_PRICE = re.compile(rf'{_AMOUNT}(?:\s?[-–]\s?{_AMOUNT})?')


def plain_text(value: object) -> str:
  """One line: entities resolved (also those escaped twice), white space folded, unprintable characters taken out.

  None is ''; a number is written out; anything else than text is ''. Tags stay: they may be meant. Applying it twice
  changes nothing.
  """
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    return ''
  before = None
  while value != before:  # ends, as every change makes the text shorter
    before = value
    value = ' '.join(_UNPRINTABLE.sub('', _ENTITY.sub(_character, value)).split())
  return value


def _character(entity: re.Match) -> str:
  name = entity.group(1)
  return html.unescape(f'&{name}') if name[0] == '#' else html.entities.html5.get(name, f'&{name}')


def clean_text(value: object) -> str:
  """`plain_text` without markup; '' if what is left is a script or a style sheet.

  A title of the dumps may be `<span class="a-size-medium a-color-secondary"` (unfinished), or a page's script.
  """
  text, before = plain_text(value), None
  while text != before:
    before = text
    for pattern in (_BLOCK, _COMMENT, _TAG, _TAG_REST):
      text = pattern.sub(' ', text)
    text = plain_text(_without_unfinished_tags(text))
  return '' if _CODE.search(text) else text


def _without_unfinished_tags(text: str) -> str:
  """`text` up to the unfinished tags at its end: all at once, as a title may be 100 kB of them."""
  end = len(text)
  while (begin := text.rfind('<', 0, end)) >= 0 and (
      _TAG_WITH_ATTRIBUTE.fullmatch(text, begin, end)
      or (not text[:begin].strip() and _OPENING_TAG.fullmatch(text, begin, end))):
    end = begin
  return text[:end]


def clean_brand(value: object) -> str:
  """`clean_text` without the page's own words: 'by\\n    \\n    Apple' is 'Apple'."""
  text = clean_text(value)
  byline = isinstance(value, str) and re.match(r'\s*by\s*\n', value)
  return re.sub(r'^by ', '', text) if byline else text


def clean_price(value: object) -> str:
  """A price such as '$12.99' or '$1,299.00 - $1,499.00', as it is written; '' for all that is no price.

  A bare JSON number is in dollars, as in the dumps of 2014.
  """
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return f'${value:.2f}' if 0 < value < 1e9 else ''
  text = clean_text(value)
  return text if _PRICE.fullmatch(text) else ''


def clean_category(value: object, depth: int | None = None) -> str:
  """The levels from broad to narrow, joined with ', ', the first `depth` of them; a level already named is not named again.

  In the dumps a product's list of features sometimes runs on behind its levels. So a level that is nothing but markup,
  or a sentence (it ends in a full stop), ends the list.
  """
  levels: dict[str, None] = {}
  for level in _flat(value):
    text = clean_text(level)
    if not text or text.endswith('.'):
      break
    levels[text] = None
  return ', '.join(list(levels)[:depth])


def _flat(value: object) -> Iterable[object]:
  if not isinstance(value, list):
    return [value]
  return value[0] if value and isinstance(value[0], list) else value  # dumps of 2014 hold a list of paths


def joined_levels(value: object) -> str:
  """A category of one's own: a text as it is, or a list of levels joined with ', '; each a `plain_text`."""
  levels = value if isinstance(value, list) else [value]
  return ', '.join(filter(None, map(plain_text, levels)))
