"""How a table of text is laid out, told by its first line: CSV, TSV, and the files of MovieLens and RecBole as they are."""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping

# The columns of 0 and 1 at the end of ml-100k's u.item.
_GENRES = ('Action', 'Adventure', 'Animation', "Children's", 'Comedy', 'Crime', 'Documentary', 'Drama', 'Fantasy', 'Film-Noir',
           'Horror', 'Musical', 'Mystery', 'Romance', 'Sci-Fi', 'Thriller', 'War', 'Western')
_U_ITEM = ('movie_id', 'title', 'release_date', 'video_release_date', 'url', 'unknown', *_GENRES)
_NO_LEVELS = ('', '(no genres listed)')
_RECBOLE = re.compile(r'(.+):(token|token_seq|float|float_seq)')
_NUMBER = r'\d+(?:\.\d+)?'


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way to write a table.

  Attributes:
    name: for people.
    columns: their names, in the order of the file; '' where the header has none.
    delimiter: what stands between two fields.
    quote: what may stand around a field; '' if a quotation mark is a letter like any other.
    header: whether the first line names the columns.
    lists: of columns that hold lists: what stands between two entries.
    flags: of columns that are not in the file, but made of columns of 0 and 1: the names of these.
    latin_1: whether the file may be in Latin-1, which it then is unless it is UTF-8.
  """

  name: str
  columns: tuple[str, ...]
  delimiter: str
  quote: str = '"'
  header: bool = True
  lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
  flags: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  latin_1: bool = False


def recognise(head: str, *, tabs: bool = False) -> Layout:
  """The layout of a table.

  Args:
    head: how its text begins, without a byte order mark; at least its first line.
    tabs: whether the file's name says that tabs are between the fields.
  """
  line = re.split(r'\r\n|\n|\r', head, maxsplit=1)[0]
  return _movielens(line) or _recbole(line) or _general(head, line, tabs)


def levels(text: str, separator: str) -> list[str]:
  """The entries of a list that is written as one text."""
  return [level for level in text.split(separator) if level not in _NO_LEVELS]


def _movielens(line: str) -> Layout | None:
  if re.fullmatch(rf'\d+\t\d+\t{_NUMBER}\t\d+', line):
    return Layout('MovieLens', ('user_id', 'item_id', 'rating', 'timestamp'), '\t', quote='', header=False)
  if re.fullmatch(rf'\d+::\d+::{_NUMBER}::\d+', line):
    return Layout('MovieLens', ('user_id', 'movie_id', 'rating', 'timestamp'), '::', quote='', header=False)
  if re.match(r'\d+::', line) and line.count('::') == 2:
    return Layout('MovieLens', ('movie_id', 'title', 'genres'), '::', quote='', header=False, lists={'genres': '|'},
                  latin_1=True)
  if re.match(r'\d+\|', line) and line.count('|') == len(_U_ITEM) - 1:
    return Layout('MovieLens', _U_ITEM, '|', quote='', header=False, lists={'genres': '|'}, flags={'genres': _GENRES},
                  latin_1=True)
  if line == 'movieId,title,genres':
    return Layout('MovieLens', ('movieId', 'title', 'genres'), ',', lists={'genres': '|'})
  return None


def _recbole(line: str) -> Layout | None:
  found = [_RECBOLE.fullmatch(field) for field in line.split('\t')]
  if not all(found):
    return None
  return Layout('RecBole', tuple(each[1] for each in found), '\t', quote='',
                lists={each[1]: ' ' for each in found if each[2].endswith('_seq')})


def _general(head: str, line: str, tabs: bool) -> Layout:
  bare = re.sub(r'"[^"]*"', '', line)
  delimiter = '\t' if tabs else max(',\t;|', key=bare.count)  # the first of those that are there most
  try:
    columns = next(csv.reader(io.StringIO(head, newline=''), delimiter=delimiter), [])
  except csv.Error:
    columns = line.split(delimiter)
  return Layout('TSV' if delimiter == '\t' else 'CSV', tuple(columns), delimiter)
