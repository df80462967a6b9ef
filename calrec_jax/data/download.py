"""Dumps come from their publishers' servers into a folder: first a plan to agree to, then the files, with a record of them.

`downloads.json` beside the files says of each where it came from, its size, sha256, version and date. A file appears under its
name when it is whole and checked (`http_files`); one that is recorded, and still has its size, is not asked for again.
"""

import dataclasses
import datetime
import os
import pathlib
import shutil
from collections.abc import Sequence

from calrec_jax import outputs
from calrec_jax.data import amazon_releases, http_files
from calrec_jax.errors import UserError

RECORD = 'downloads.json'


@dataclasses.dataclass
class _File:
  """A file of a plan.

  Attributes:
    path: where it will lie.
    address: where it comes from.
    remote: the server's description; None where the file is here and recorded.
    here: bytes of it that are here.
    whole: whether the file is here under its name.
  """

  path: pathlib.Path
  address: str
  remote: http_files.Remote | None
  here: int
  whole: bool

  @property
  def missing(self) -> int | None:
    """Bytes to fetch; None where the server does not say."""
    if self.whole:
      return 0
    return None if self.remote.size is None else self.remote.size - self.here


@dataclasses.dataclass
class Plan:
  """What a download will fetch. `release` is that of all files."""

  release: amazon_releases.Release
  out: pathlib.Path
  files: list[_File]

  @property
  def asks(self) -> bool:
    """Whether there is anything to fetch."""
    return not all(file.whole for file in self.files)

  @property
  def text(self) -> str:
    """For the user to agree to: each address with its size, the sum, and the terms."""
    rows = []
    for file in self.files:
      some = f'  ({_size(file.here)} of it are here)' if file.here and not file.whole else ''
      size = 'here' if file.whole else _size(file.remote.size)
      rows.append(f'{size:>12}  {file.address}{some}')
    known = [file.missing for file in self.files if file.missing is not None]
    total = ('' if len(known) == len(self.files) else 'more than ') + _size(sum(known))
    return '\n'.join([f'{self.release.title}:', *rows, f'{total:>12}  to fetch, into {self.out}', self.release.note])


def plan_amazon(year: int, categories: Sequence[str], *, out: str | os.PathLike, five_core: bool = False,
                ratings: bool = False, mirror: str | None = None) -> Plan:
  """Asks the servers for sizes and versions; fetches and writes nothing.

  Args:
    year, categories, five_core, ratings, mirror: as `amazon_releases.addresses`.
    out: the folder; it need not be there.

  Raises:
    UserError: there is no such category, the server lacks a file or cannot be reached, another file lies in its place, or the
      disk has too little room.
  """
  release, out = amazon_releases.release(year), pathlib.Path(out)
  addresses = amazon_releases.addresses(year, categories, five_core=five_core, ratings=ratings, mirror=mirror)
  there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
  if not there.is_dir():
    raise UserError(f'{there}: is a file, where a folder is expected; choose another --out.')
  record = _read_record(out)
  try:
    files = [_planned(out / address.rpartition('/')[2], address, release.title, record) for address in addresses]
  except http_files.Missing as error:
    others = [base for base in release.bases if not addresses[0].startswith(base + '/')]
    raise UserError(f'{error}; {release.title} has {", ".join(release.categories)}. If the files have moved, see '
                    f'{release.page}, or try --mirror {" or ".join(others)}.') from error
  needed = sum(file.missing or 0 for file in files)
  if needed > (free := shutil.disk_usage(there).free):
    raise UserError(f'{out}: {_size(needed)} are to be fetched, and {_size(free)} are free; make room, or choose another '
                    '--out.')
  return Plan(release, out, files)


def fetch(plan: Plan, *, progress: bool = True) -> dict:
  """Fetches what a plan lacks; returns a report: `out`, `fetched` (files, bytes), and what is recorded of its `files`.

  Raises UserError as `http_files.fetch`; what is whole by then stays, and the same plan goes on.
  """
  try:
    plan.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{plan.out}: cannot be made ({error.strerror}); choose another --out.') from error
  record, fetched = _read_record(plan.out), {'files': 0, 'bytes': 0}
  for file in plan.files:
    if file.remote is None:
      continue
    if file.whole:
      remote, sha256 = file.remote, _check(file, progress)
    else:
      try:
        remote, sha256 = http_files.fetch(file.remote, file.path, progress=progress)
      except http_files.Missing as error:
        raise UserError(f'{error}, though its size was told; run the same command again, or give another --mirror.') from error
      fetched = {'files': fetched['files'] + 1, 'bytes': fetched['bytes'] + file.path.stat().st_size - file.here}
    record[file.path.name] = {
        'release': plan.release.title, 'address': file.address, 'size': file.path.stat().st_size, 'sha256': sha256,
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), 'etag': remote.etag,
        'last_modified': remote.modified, 'checksums_of_the_server': remote.checksums, 'terms': plan.release.page}
    outputs.write_json(plan.out / RECORD, {'files': record})
  return {'out': os.fspath(plan.out), 'fetched': fetched,
          'files': {file.path.name: record[file.path.name] for file in plan.files}}


def format_report(report: dict) -> str:
  """A report of `fetch` in two lines."""
  files, fetched = report['files'], report['fetched']
  size = sum(each['size'] for each in files.values())
  before = len(files) - fetched['files']
  return (f'{report["out"]}: {len(files)} files, {_size(size)}{f", {before} of them from before" if before else ""}. Where '
          f'they came from is in {RECORD}.\nTurn them into histories with `calrec prepare dumps`.')


def _planned(path: pathlib.Path, address: str, title: str, record: dict) -> _File:
  """What is here of a file of the release `title`, and what the server has."""
  known = record.get(path.name)
  if not path.exists():
    remote = http_files.look(address)
    return _File(path, address, remote, http_files.partial_size(remote, path), whole=False)
  size = path.stat().st_size
  if known is not None:
    if known['release'] != title:
      raise UserError(f'{path}: is of {known["release"]}, and that of {title} is asked for; choose another --out.')
    if known['size'] != size:
      raise UserError(f'{path}: has {size:,} bytes, and had {known["size"]:,} when it was fetched; remove it to fetch it '
                      'again.')
    return _File(path, address, None, size, whole=True)
  remote = http_files.look(address)
  if not path.is_file() or remote.size not in (None, size):
    raise UserError(f'{path}: something else lies there, which is not recorded in {RECORD} and not of the size of {address}; '
                    'choose another --out, or remove it.')
  return _File(path, address, remote, size, whole=True)


def _check(file: _File, progress: bool) -> str:
  """The sha256 of a file that is here and not recorded. UserError: it is not whole."""
  try:
    sha256 = http_files.check(file.path, file.remote, name=file.path.name, progress=progress)
  except UserError as error:
    raise UserError(f'{file.path}: is here, but is not the file at {file.address}: {error} Remove it to fetch it again.'
                    ) from error
  http_files.forget(file.path)
  return sha256


def _read_record(out: pathlib.Path) -> dict[str, dict]:
  """What is recorded of each file in a folder, by name. UserError: the record cannot be read."""
  path = out / RECORD
  if not path.exists():
    return {}
  files = outputs.read_object(path).get('files')
  if not isinstance(files, dict) or not all(
      isinstance(each, dict) and {'release', 'size'} <= each.keys() for each in files.values()):
    raise UserError(f'{path}: is no record of downloads; restore or remove it.')
  return files


def _size(n_bytes: int | None) -> str:
  if n_bytes is None:
    return 'unknown'
  for unit, size in (('GB', 10**9), ('MB', 10**6), ('kB', 10**3)):
    if n_bytes >= size:
      return f'{n_bytes / size:,.1f} {unit}'
  return f'{n_bytes} bytes'
