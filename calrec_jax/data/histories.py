"""The histories folder: purchase histories and their items, the project's own format and the door for other data.

A folder holds
  sequences.jsonl.gz  a line a user: {"user_id": "u7", "item_ids": ["a", "b", "c"], "timestamps": [1, 1, 5]}; in time
                      order; "timestamps" (seconds) is in all lines or in none
  items.jsonl.gz      a line an item: {"item_id": "a", "title": "…", "category": "…", "brand": "…", "price": "…"};
                      '' is unknown
  dataset.json        the description: name, sources, options, what was dropped and why, statistics, fingerprint
`.jsonl` and `.parquet` stand in for `.jsonl.gz` when a folder is read. A folder without dataset.json has its own name.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import duckdb
import numpy as np

from calrec_jax import outputs, storage
from calrec_jax.data import cleaning, describe, json_lines, similar_ids, time_order
from calrec_jax.errors import UserError

FIELDS = describe.FIELDS
FORMAT = 1
_HELD_OUT = {'train': 2, 'validation': 1, 'test': 0}  # of leave-one-out: events at a history's end (method: Data)
_BLOCK_USERS = 1 << 14  # whose events are Python's objects at a time, while they are written
_SUFFIXES = ('.jsonl.gz', '.jsonl', '.parquet')
_WRITTEN = {'dataset.json', 'items.jsonl.gz', 'sequences.jsonl.gz'}


@dataclasses.dataclass(frozen=True)
class Histories:
  """One data set in memory.

  Attributes:
    name: of the data set, its folder, and its SeqIO Task.
    user_ids: U distinct texts.
    item_ids: I distinct texts, in the order of the items file; an item need not occur in a history.
    items: I; each maps 'title', 'category', 'brand', 'price' to one line of text, '' if unknown.
    offsets: int64 [U + 1]; history u is events[offsets[u]:offsets[u + 1]].
    events: int32 [offsets[-1]], item indices in time order.
    timestamps: int64 seconds, like events; None if unknown.
    cutoffs: the times, in seconds, at which the validation and the test period begin; None: the split is leave-one-out.
    options: how the data set was prepared, as in dataset.json; {} if unknown.
  """

  name: str
  user_ids: list[str]
  item_ids: list[str]
  items: list[dict[str, str]]
  offsets: np.ndarray
  events: np.ndarray
  timestamps: np.ndarray | None = None
  cutoffs: tuple[int, int] | None = None
  options: Mapping[str, object] = dataclasses.field(default_factory=dict)

  def history(self, user: int) -> np.ndarray:
    """The item indices of user number `user`: int32 [its number of events], a view."""
    return self.events[self.offsets[user]:self.offsets[user + 1]]

  def seen(self, user: int, split: str) -> np.ndarray:
    """What `split` may see of a user's history, its target at the end: int32, a view; empty without a target."""
    return self.history(user)[:self.visible(split)[user]]

  @property
  def event_users(self) -> np.ndarray:
    """int64, like `events`: the number of the user whose event it is."""
    return np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))

  @property
  def event_places(self) -> np.ndarray:
    """int64, like `events`: the place of an event in its history, from 0."""
    return np.arange(len(self.events)) - self.offsets[self.event_users]

  def among_first(self, counts_U: np.ndarray) -> np.ndarray:
    """bool, like `events`: whether an event is among the first so many of its history."""
    return self.event_places < counts_U[self.event_users]

  def visible(self, split: str) -> np.ndarray:
    """How many events of each history `split` may see, its target included: int64 [U], not to be changed.

    Leave-one-out sees all but the last two events (`train`), the last (`validation`) or none (`test`). Split by time, `train`
    sees what was before the validation period, the others what was before their period and the first event in it; nothing,
    where there is none.
    """
    if split not in self._visible:
      raise ValueError(f'split {split!r}: expected one of {list(self._visible)}.')
    return self._visible[split]

  @functools.cached_property
  def _visible(self) -> dict[str, np.ndarray]:
    lengths_U = np.diff(self.offsets).astype(np.int64)
    if self.cutoffs is None:
      return {split: np.maximum(lengths_U - held_out, 0) for split, held_out in _HELD_OUT.items()}
    users_E, n_users = self.event_users, len(self.user_ids)
    before_U, until_U = (np.bincount(users_E[self.timestamps < time], minlength=n_users) for time in self.cutoffs)
    return {'train': before_U, 'validation': np.where(before_U < until_U, before_U + 1, 0),
            'test': np.where(until_U < lengths_U, until_U + 1, 0)}

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 hex of the content: ids, order, texts, times; not of the name or of how the files are stored."""
    digest = hashlib.sha256(f'calrec histories {FORMAT}\n'.encode())
    fields = [[item[field] for field in FIELDS] for item in self.items]
    for texts in (self.user_ids, self.item_ids, fields):
      digest.update(json.dumps(texts).encode() + b'\n')
    digest.update(self.offsets.astype('<i8').tobytes() + self.events.astype('<i4').tobytes())
    digest.update(b'' if self.timestamps is None else self.timestamps.astype('<i8').tobytes())
    digest.update(b'' if self.cutoffs is None else f'cutoffs {self.cutoffs}'.encode())
    return digest.hexdigest()


def check_name(name: str) -> str:
  """Returns `name`; raises UserError unless it can name a folder and a SeqIO Task."""
  if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]*', name):
    raise UserError(f'{name!r} cannot name a data set; begin with a letter or digit; then also _ - and . will do.')
  return name


def load(folder: str | os.PathLike) -> Histories:
  """Reads a histories folder.

  Raises:
    UserError: a file is missing, truncated, or holds a line that is not as it should be; an item of a history is not in
      the items file; the content is not the one that dataset.json describes.
  """
  folder = storage.local(folder)
  if not folder.is_dir():
    raise UserError(f'{folder}: no such folder; make it with `calrec prepare`.')
  description = _description(folder / 'dataset.json')
  sequences, items = find_file(folder, 'sequences'), find_file(folder, 'items')
  item_ids, fields = read_items(items, json_lines.BadLines(items, None), progress=False)
  reader = _SequenceReader(sequences, item_ids, json_lines.BadLines(sequences, None))
  reader.read(min_length=1, progress=False)
  histories = dataclasses.replace(reader.histories(description.get('name', folder.resolve().name), fields),
                                  cutoffs=_cutoffs(description, folder), options=description.get('options', {}))
  if description and histories.fingerprint != description.get('fingerprint'):
    raise UserError(f'{folder}: its content is not what its dataset.json describes (fingerprint); prepare it anew.')
  return histories


def _description(path: pathlib.Path) -> dict:
  if not path.exists():
    return {}
  try:
    description = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f'{path}: not JSON ({error}); prepare the data set anew.') from error
  if not isinstance(description, dict) or not isinstance(description.get('name'), str):
    raise UserError(f'{path}: describes no data set; prepare it anew.')
  return description


def _cutoffs(description: dict, folder: pathlib.Path) -> tuple[int, int] | None:
  cutoffs = description.get('cutoffs')
  if cutoffs is not None and not (isinstance(cutoffs, list) and len(cutoffs) == 2 and all(map(_is_time, cutoffs))):
    raise UserError(f'{folder / "dataset.json"}: "cutoffs" is {cutoffs!r}, where two times are expected; prepare it anew.')
  return cutoffs and tuple(cutoffs)


def find_file(folder: pathlib.Path, stem: str) -> pathlib.Path:
  found = [folder / (stem + suffix) for suffix in _SUFFIXES if (folder / (stem + suffix)).exists()]
  if len(found) != 1:
    what = ' and '.join(path.name for path in found) or f'no {stem}.jsonl.gz (nor .jsonl, .parquet)'
    raise UserError(f'{folder}: holds {what}; exactly one such file is expected.')
  return found[0]


def write(scratch: str | os.PathLike, histories: Histories, description: dict) -> dict:
  """Writes the three files of a histories folder into `scratch`, with the same bytes for the same content.

  Args:
    scratch: an existing folder, best the scratch folder of `outputs.new_folder`.
    histories: the data set.
    description: 'sources', 'options', 'steps' and the like; see `describe.format_description`.

  Returns:
    The description as stored: with format, name, statistics and fingerprint.
  """
  scratch = pathlib.Path(scratch)
  json_lines.write_texts(scratch / 'sequences.jsonl.gz', _sequence_lines(histories))
  json_lines.write(scratch / 'items.jsonl.gz', ({'item_id': item_id, **{field: item[field] for field in FIELDS}}
                                            for item_id, item in zip(histories.item_ids, histories.items, strict=True)))
  description = {
      'format': FORMAT,
      'name': histories.name,
      **description,
      **({} if histories.cutoffs is None else {'cutoffs': list(histories.cutoffs)}),
      'statistics': describe.statistics(histories.items, histories.offsets, histories.events),
      'fingerprint': histories.fingerprint,
  }
  outputs.write_json(scratch / 'dataset.json', description)
  return description


def made_before(out: str | os.PathLike, sources: Sequence[str | os.PathLike], *, name: str, options: Mapping[str, object],
                agrees: Callable[[dict], bool] = lambda description: True, progress: bool = True) -> dict | None:
  """The description of the data set in `out`, if these files and options made it, which is logged; None else.

  Args:
    out: where the data set would be written; nothing need be there.
    sources: the files in the order in which they are read; their bytes count, not their names.
    name: of the data set.
    options: as dataset.json would hold them.
    agrees: whether the rest of a description that decides is what it would be; asked if all else is.
    progress: whether to show progress on stderr.

  Raises:
    UserError: a source is missing, or cannot be read.
  """
  if not _WRITTEN <= set(storage.names(out)):
    return None
  found = outputs.read_object(storage.local(out, files=['dataset.json']) / 'dataset.json')
  if (found.get('format'), found.get('name'), found.get('options')) != (FORMAT, name, dict(options)):
    return None
  told = found.get('sources')
  made = [source.get('sha256') for source in told if isinstance(source, dict)] if isinstance(told, list) else []
  if len(made) != len(sources) or not all(digest == json_lines.digest(storage.local(path), progress=progress)
                                          for digest, path in zip(made, sources, strict=True)) or not agrees(found):
    return None
  logging.info('%s: already made of these files by these rules; nothing is done.', os.fspath(out))
  return found


def _sequence_lines(histories: Histories) -> Iterator[str]:
  """JSON as `json.dumps` writes it, without quoting an item's id anew for each event."""
  quote = json.JSONEncoder(ensure_ascii=False).encode
  ids, offsets = np.array(list(map(quote, histories.item_ids)), object), histories.offsets.tolist()
  for first in range(0, len(histories.user_ids), _BLOCK_USERS):
    users = histories.user_ids[first:first + _BLOCK_USERS]
    begin, end = offsets[first], offsets[first + len(users)]
    items = ids[histories.events[begin:end]].tolist()
    times = None if histories.timestamps is None else histories.timestamps[begin:end].tolist()
    for user, user_id in enumerate(users, start=first):
      history = slice(offsets[user] - begin, offsets[user + 1] - begin)
      more = '' if times is None else f', "timestamps": {times[history]}'
      yield f'{{"user_id": {quote(user_id)}, "item_ids": [{", ".join(items[history])}]{more}}}'


def prepare(sequences: str | os.PathLike, items: str | os.PathLike, *, name: str, out: str | os.PathLike,
            min_length: int = 3, max_bad_lines: int = 0, ties: str = 'dump', split: str = 'leave_one_out', progress: bool = True
            ) -> dict:
  """Makes a histories folder from ready sequences: checks them, cleans the items' texts, drops short histories.

  The histories are taken as they are: in the file's order of users, repeats kept, an item in no history kept. Texts are only
  made one line of plain text (`cleaning.plain_text`: entities, white space); tags in them stay. A category may be a text or a
  list of levels, which are joined with ', '. Where `out` is what these files and options make, nothing is done (`made_before`).

  Args:
    sequences: JSON lines (gzipped or not) or .parquet, as in this module's docstring.
    items: the same.
    name: of the data set.
    out: the new folder.
    min_length: shorter histories are dropped and counted.
    max_bad_lines: lines of each file that may be broken (no JSON object, a field missing or of a wrong type).
    ties: the order of a user's events of one time: `dump`, the file's; or `hashed`, see `time_order`.
    split: `leave_one_out`, or `time`: see `time_order.cutoffs`.
    progress: whether to show progress on stderr.

  Returns:
    The description, as in dataset.json.

  Raises:
    UserError: bad input, nothing left, or `out` in use.
  """
  check_name(name)
  time_order.check_options(ties, split)
  options = {'min_length': min_length, 'max_bad_lines': max_bad_lines, 'ties': ties, 'split': split, 'repeats': 'kept'}
  if known := made_before(out, [sequences, items], name=name, options=options, progress=progress):
    return known
  with outputs.new_folder(out) as scratch:
    sequences, items = storage.local(sequences), storage.local(items)
    bad_items = json_lines.BadLines(items, max_bad_lines)
    bad_sequences = json_lines.BadLines(sequences, max_bad_lines)
    item_ids, fields = read_items(items, bad_items, progress=progress)
    reader = _SequenceReader(sequences, item_ids, bad_sequences)
    reader.read(min_length=min_length, progress=progress)
    bad_items.tell()
    bad_sequences.tell()
    histories = reader.histories(name, fields)
    if ties == 'hashed':
      histories = _in_hashed_order(histories)
    if split == 'time':
      histories = dataclasses.replace(histories, cutoffs=time_order.cutoffs(histories.timestamps, name))
    similar = similar_ids.counts(histories.user_ids, histories.item_ids)
    kept = {'events': len(histories.events), 'users': len(histories.user_ids), 'items': len(item_ids)}
    description = {
        'sources': [_source(path, progress=progress) for path in (sequences, items)],
        'options': options,
        'steps': [
            {'step': 'read', 'dropped': 0, 'events': kept['events'] + reader.short_events,
             'users': kept['users'] + reader.short_users, 'items': len(item_ids)},
            {'step': f'histories shorter than {min_length}', 'dropped': reader.short_events, **kept},
        ],
        'bad_lines': {'sequences': bad_sequences.count, 'items': bad_items.count},
        **({'similar_ids': similar} if any(similar.values()) else {}),
    }
    return write(scratch, histories, description)


def _in_hashed_order(histories: Histories) -> Histories:
  """The events of each user by (time, hash). Raises UserError where there are no times."""
  if histories.timestamps is None:
    raise UserError(f'{histories.name}: has no timestamps, so which events are of one time is not known; use --ties dump.')
  users_E = histories.event_users
  hashes = [time_order.tie_hash(histories.user_ids[user], histories.item_ids[item])
            for user, item in zip(users_E.tolist(), histories.events.tolist(), strict=True)]
  order_E = np.lexsort((np.arange(len(users_E)), np.array(hashes), histories.timestamps, users_E))
  return dataclasses.replace(histories, events=histories.events[order_E])


def _rows(path: pathlib.Path, bad: json_lines.BadLines, *, progress: bool) -> Iterator[tuple[int, dict]]:
  """(line or row number from 1, row) of JSON lines or of a Parquet file."""
  if path.suffix != '.parquet':
    yield from json_lines.objects(path, bad, progress=progress)
    return
  try:
    cursor = duckdb.connect().execute('SELECT * FROM read_parquet(?)', [str(json_lines.file_at(path))])
  except duckdb.Error as error:
    raise UserError(f'{path}: not a Parquet file that can be read ({str(error).splitlines()[0]}); write it anew.') from error
  columns = [column[0] for column in cursor.description]
  number = 0
  while batch := cursor.fetchmany(10_000):
    for row in batch:
      number += 1
      yield number, dict(zip(columns, row, strict=True))


def _source(path: str | os.PathLike, *, progress: bool) -> dict:
  path = pathlib.Path(path)
  source = json_lines.inspect(path, progress=progress).description()
  if path.suffix == '.parquet':
    source['lines'] = duckdb.connect().execute('SELECT count(*) FROM read_parquet(?)', [str(path)]).fetchone()[0]
  return source


def _text_id(value: object) -> str | None:
  """An id as text; None if it cannot be one. Whole numbers are written out."""
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return value if isinstance(value, str) and value and not re.search('[\ud800-\udfff]', value) else None


def read_items(path: pathlib.Path, bad: json_lines.BadLines, *, progress: bool = True
               ) -> tuple[dict[str, int], list[dict[str, str]]]:
  """The items file as {item id: index} and the cleaned fields of each."""
  item_ids: dict[str, int] = {}
  fields = []
  for number, row in _rows(path, bad, progress=progress):
    item_id = _text_id(row.get('item_id'))
    if item_id is None:
      bad.add(number, f'"item_id" is {repr(row.get("item_id"))[:80]}, where a text is expected')
      continue
    if item_id in item_ids:
      raise UserError(f'{path}: line {number}: item {item_id!r} is listed a second time; list each item once.')
    item_ids[item_id] = len(item_ids)
    item = {field: cleaning.plain_text(row.get(field)) for field in FIELDS}
    fields.append(item | {'category': cleaning.joined_levels(row.get('category'))})
  if not item_ids:
    raise UserError(f'{path}: lists no item; expected lines with "item_id", "title", "category", "brand", "price".')
  return item_ids, fields


class _SequenceReader:
  """Reads a sequences file into arrays; keeps count of what it drops."""

  def __init__(self, path: pathlib.Path, item_ids: dict[str, int], bad: json_lines.BadLines):
    self.path, self.item_ids, self.bad = path, item_ids, bad
    self.users: dict[str, int] = {}  # id -> line
    self.kept: list[str] = []
    self.events: list[np.ndarray] = []
    self.times: list[np.ndarray] = []
    self.has_times: bool | None = None
    self.short_users = self.short_events = 0

  def read(self, *, min_length: int, progress: bool) -> None:
    for number, row in _rows(self.path, self.bad, progress=progress):
      user, items, times = _text_id(row.get('user_id')), row.get('item_ids'), row.get('timestamps')
      fault = self._fault(user, items, times)
      if fault:
        self.bad.add(number, fault)
      elif self._checked_user(user, number, times) and len(items) >= min_length:
        self.kept.append(user)
        self.events.append(self._indices(items, user, number))
        self.times.append(np.array(times or [], np.int64))
      else:
        self.short_users += 1
        self.short_events += len(self._indices(items, user, number))
    if not self.kept:
      raise UserError(f'{self.path}: nothing is left: none of its {len(self.users)} histories has {min_length} events '
                      'or more (--min_length).')

  def _fault(self, user: str | None, items: object, times: object) -> str:
    """What makes a line bad; '' if it is good."""
    if user is None:
      return '"user_id" is missing, or no text'
    if not isinstance(items, list) or not all(type(item) in (str, int) for item in items):
      return '"item_ids" is missing, or no list of texts'
    if times is None:
      return ''
    if not isinstance(times, list) or len(times) != len(items) or not all(_is_time(time) for time in times):
      return '"timestamps" is no list of whole seconds, one for each item'
    if times != sorted(times):
      return '"timestamps" go back in time; order the events by time'
    if times and times[-1] >= time_order.MILLISECONDS:
      return f'"timestamps" holds {times[-1]}, which is no time in seconds; divide milliseconds by 1,000'
    return ''

  def _checked_user(self, user: str, number: int, times: object) -> bool:
    first = self.users.setdefault(user, number)
    if first != number:
      raise UserError(f'{self.path}: line {number}: user {user!r} is already in line {first}; give each user one line.')
    if self.has_times not in (None, times is not None):
      raise UserError(f'{self.path}: line {number}: "timestamps" must be in all lines or in none.')
    self.has_times = times is not None
    return True

  def _indices(self, items: list[str | int], user: str, number: int) -> np.ndarray:
    try:
      return np.array([self.item_ids[str(item)] for item in items], np.int32)
    except KeyError as error:
      raise UserError(f'{self.path}: line {number}: user {user!r} has the unknown item {error}; '
                      'list it in the items file, or take it out.') from None

  def histories(self, name: str, fields: list[dict[str, str]]) -> Histories:
    offsets = np.cumsum([0] + [len(events) for events in self.events], dtype=np.int64)
    times = np.concatenate(self.times) if self.has_times else None
    return Histories(name, self.kept, list(self.item_ids), fields, offsets, np.concatenate(self.events), times)


def _is_time(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
