"""A folder of dumps, a category each: which files are whose, and all of them prepared one after the other."""

import os
import re
from collections.abc import Iterator, Sequence

from calrec_jax import storage
from calrec_jax.data import amazon
from calrec_jax.errors import UserError

_FILE = re.compile(r'(?P<kind>meta_|reviews_|ratings_|)(?P<category>[A-Z0-9][A-Za-z0-9_-]*?)(_5)?\.(json|jsonl|csv)(\.gz)?')


def find(folder: str | os.PathLike, categories: Sequence[str] | None = None) -> dict[str, tuple[str, list[str]]]:
  """The dumps in a folder, by their names as published: {category: (reviews, [metadata])}, by name.

  Reviews are `Video_Games_5.json.gz`, `Video_Games.jsonl.gz`, `reviews_Video_Games_5.json.gz`, `ratings_Video_Games.csv` and
  the like, metadata `meta_Video_Games.json.gz`. A category begins with a capital, and may have none; the folder may hold
  other files.

  Args:
    folder: where they lie.
    categories: those wanted, in upper or lower case; None: all that have reviews.

  Raises:
    UserError: no such folder, none of these, a category without reviews, or with several files of a kind.
  """
  if not storage.is_dir(folder):
    raise UserError(f'{folder}: {"is a file, not a folder" if storage.exists(folder) else "no such folder"}; check the path.')
  reviews: dict[str, list[str]] = {}
  meta: dict[str, list[str]] = {}
  for name in storage.names(folder):
    if match := _FILE.fullmatch(name):
      (meta if match['kind'] == 'meta_' else reviews).setdefault(match['category'], []).append(name)
  if categories is not None:
    known = {category.lower(): category for category in reviews}
    if missing := [category for category in categories if category.lower() not in known]:
      raise UserError(f'{folder}: holds no reviews of {missing[0]}; it has those of {", ".join(sorted(reviews)) or "nothing"}.')
    reviews = {known[category.lower()]: reviews[known[category.lower()]] for category in categories}
  if not reviews:
    raise UserError(f'{folder}: holds no reviews, such as Video_Games_5.json.gz or Video_Games.jsonl.gz; check the path.')
  for files in (files for found in (reviews, meta) for category, files in found.items() if category in reviews):
    if len(files) > 1:
      raise UserError(f'{folder}: holds {" and ".join(files)} of one category; move all but one away, or name it by '
                      '--reviews and --meta.')
  return {category: (storage.join(folder, *files), [storage.join(folder, name) for name in meta.get(category, [])])
          for category, files in sorted(reviews.items())}


def prepare(folder: str | os.PathLike, out: str | os.PathLike, categories: Sequence[str] | None = None, **options: object
            ) -> Iterator[dict]:
  """Makes `out`/<category in lower case> of each category of a folder, and yields its description.

  Those already made of the same files by the same rules are passed over, so that the same call goes on after a stop.

  Args:
    folder: see `find`.
    out: where the histories folders will be; a run's DATA_DIR.
    categories: see `find`.
    **options: of `amazon.prepare_dumps`.

  Raises:
    UserError: as `find` and `amazon.prepare_dumps`; what was made before stays.
  """
  found = find(folder, categories)
  names = [category.lower() for category in found]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f'{folder}: holds several categories that would be called {twice[0]}; name one by --categories.')
  for name, (reviews, meta) in zip(names, found.values(), strict=True):
    yield amazon.prepare_dumps([reviews], meta, name=name, out=storage.join(out, name), **options)
