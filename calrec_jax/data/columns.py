"""Which column of a table holds what: as the user says, else by names that are usual."""

import re
from collections.abc import Mapping, Sequence

from calrec_jax.errors import UserError
from calrec_jax.printable import printable

# Names in small letters and digits alone: userId, user_id and "User ID" are one.
_ITEM = ('item', 'itemid', 'iid', 'product', 'productid', 'movie', 'movieid', 'asin', 'parentasin', 'sku', 'article',
         'articleid', 'book', 'bookid', 'track', 'trackid', 'song', 'songid', 'artistid', 'business', 'businessid', 'appid',
         'gameid', 'newsid')
EVENT_NAMES = {
    'user': ('user', 'userid', 'uid', 'customer', 'customerid', 'reviewerid', 'visitorid', 'memberid', 'accountid'),
    'item': _ITEM,
    'time': ('time', 'timestamp', 'ts', 'datetime', 'date', 'unixtime', 'unixreviewtime', 'unixtimestamp', 'eventtime',
             'eventdate', 'createdat', 'purchasedat', 'purchasetime', 'purchasedate', 'ordertime', 'orderdate',
             'transactiondate', 'invoicedate'),
    'rating': ('rating', 'ratings', 'stars', 'score', 'overall'),
}
ITEM_NAMES = {
    'item_id': (*_ITEM, 'id'),
    'title': ('title', 'name', 'itemname', 'itemtitle', 'productname', 'producttitle', 'movietitle', 'moviename', 'booktitle'),
    'category': ('category', 'categories', 'categoryname', 'genre', 'genres', 'class', 'productcategory', 'maincategory'),
    'brand': ('brand', 'brandname', 'manufacturer', 'store'),
    'price': ('price', 'unitprice'),
}


def parse_item_columns(words: Sequence[str]) -> dict[str, str]:
  """`title=name,category=genres` as a dictionary; an empty column name says that there is none.

  Raises:
    UserError: an entry without =, or of something that an item does not have.
  """
  found = {}
  for word in filter(None, ','.join(words).split(',')):
    role, equals, column = word.partition('=')
    if not equals or role not in ITEM_NAMES:
      raise UserError(f'--item_columns {word!r}: write WHAT=COLUMN,WHAT=COLUMN with {", ".join(ITEM_NAMES)}.')
    found[role] = column
  return found


def of_events(columns: Sequence[str], where: str, given: Mapping[str, str], *, rated: bool) -> dict[str, str]:
  """The columns of an events table: `user`, `item`, `time`, and, if `rated`, `rating`. Arguments and errors as `find`."""
  needed = [role for role in EVENT_NAMES if role != 'rating' or rated]
  return find(columns, where, {role: EVENT_NAMES[role] for role in needed},
              {role: column for role, column in given.items() if role in needed}, needed=needed, flag='--{role}_column')


def of_items(columns: Sequence[str], where: str, given: Mapping[str, str]) -> dict[str, str]:
  """The columns of an items table: `item_id`, `title`, and the others that are there. Arguments and errors as `find`."""
  return find(columns, where, ITEM_NAMES, given, needed=('item_id', 'title'), flag='--item_columns {role}=COLUMN')


def find(columns: Sequence[str], where: str, names: Mapping[str, Sequence[str]], given: Mapping[str, str], *,
         needed: Sequence[str], flag: str) -> dict[str, str]:
  """The column of each role that has one.

  Args:
    columns: of the table.
    where: the table's path, for messages.
    names: usual names of each role.
    given: columns that the user named, by role; '' says that there is none.
    needed: roles that must have a column.
    flag: how the user names a column; {role} stands for the role.

  Raises:
    UserError: a column that is not there, that stands twice, or that would serve two roles; no column, or several, for a role.
  """
  listed = f'its columns: {", ".join(printable(column) or "(no name)" for column in columns)[:400] or "none"}'
  found = {}
  for role, usual in names.items():
    named = flag.format(role=role)
    if role in given:
      candidates = [given[role]] if given[role] else []
      if candidates and candidates[0] not in columns:
        raise UserError(f'{where}: has no column {given[role]!r} for {named}; {listed}.')
    else:
      taken = set(given.values())
      candidates = [column for column in dict.fromkeys(columns) if column not in taken and _plain(column) in usual]
    if len(candidates) > 1:
      raise UserError(f'{where}: {" and ".join(candidates)} may each be the {role}; say which by {named}; {listed}.')
    if candidates:
      if columns.count(candidates[0]) > 1:
        raise UserError(f'{where}: has {columns.count(candidates[0])} columns {candidates[0]!r}; give them different names.')
      found[role] = candidates[0]
    elif role in needed:
      raise UserError(f'{where}: which column is the {role} cannot be told; say it by {named}; {listed}.')
  doubled = [column for column in found.values() if list(found.values()).count(column) > 1]
  if doubled:
    raise UserError(f'{where}: column {doubled[0]!r} is to be two things, '
                    f'{" and ".join(role for role in found if found[role] == doubled[0])}; {listed}.')
  return found


def _plain(name: str) -> str:
  return re.sub(r'[^a-z0-9]', '', name.lower())
