"""`calrec prepare dumps` at size: against a plain Python loop and pandas, and how time and memory grow.

Generated reviews in the format of Amazon 2018, lines of 580 bytes with their text, as in its dumps, a fifth as many users as
reviews and a fifteenth as many items; all at once from one .gz, and from eight. The peers do the same work and write the same
histories (it is checked): `plain` unpacks with gzip, parses with json and counts with dictionaries; `pandas` reads with
`read_json` in chunks. Ours also takes the files' digests, and judges every line. The ratio is the plain loop's time over ours,
from one .gz; `gunzip` is the share of ours that unpacking alone would take.

  python benchmarks/prepare_speed.py [--reviews 1000000] [--quick]
  python benchmarks/prepare_speed.py --growth 20000000      that many, and a tenth, with --memory_limit 2GB: time, memory, disk

Two minutes; growth to 20 million takes six, and 5 GB on the disk of --work. `--quick` takes 20,000 reviews, and for both.
Prints one JSON object as its last line.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import gzip
import json
import multiprocessing
import os
import pathlib
import resource
import tempfile
import threading
import time

import numpy as np
import pandas
from isal import igzip

from calrec_jax.data import amazon, histories

K, SHORTEST, DAY = 5, 3, 86_400
AMAZON_2018 = 233_055_327  # reviews
BLOCK = 100_000
LIMIT_MB = 2000


def generated(path: pathlib.Path, n: int, files: int, seed: int = 0) -> list[pathlib.Path]:
  """Writes n reviews, by item as the dumps have them, one after the other into so many files."""
  rng = np.random.default_rng(seed)
  words = [''.join(rng.choice(list('etaoinshrdlucmfwyp'), size=size)) for size in rng.integers(2, 10, size=5000)]
  weights = 1 / np.arange(1, len(words) + 1)
  text = ' '.join(words[word] for word in rng.choice(len(words), size=700_000, p=weights / weights.sum()))
  items = np.sort((n // 15 * rng.random(n) ** 3).astype(np.int64))
  paths = [path / f'Reviews_{number}.json.gz' for number in range(files)]
  for number, path in enumerate(paths):
    with igzip.open(path, 'wb', compresslevel=3) as file:
      for begin in range(n * number // files, n * (number + 1) // files, BLOCK):
        block = items[begin:min(begin + BLOCK, n * (number + 1) // files)].tolist()
        size = len(block)
        columns = zip(block, (n // 5 * rng.random(size) ** 2).astype(np.int64).tolist(), rng.integers(1, 6, size).tolist(),
                      (rng.integers(13_889, 17_824, size) * DAY).tolist(), rng.integers(len(text) - 12_000, size=size).tolist(),
                      np.minimum(rng.exponential(300, size), 10_000).astype(int).tolist(), strict=True)
        file.write(''.join(
            f'{{"overall": {stars}.0, "verified": true, "reviewTime": "06 17, 2018", "reviewerID": "A{user * 7919:013X}", '
            f'"asin": "B{item:09X}", "style": {{"Format:": " Hardcover"}}, "reviewerName": "{text[place:place + 12]}", '
            f'"reviewText": "{text[place:place + length]}", "summary": "{text[place + 20:place + 20 + length // 8]}", '
            f'"unixReviewTime": {when}}}\n' for item, user, stars, when, place, length in columns).encode())
  return paths


def ours(paths: list[pathlib.Path], out: pathlib.Path, memory_limit: str | None = None) -> None:
  amazon.prepare_dumps(paths, name='ours', out=out, memory_limit=memory_limit, progress=False)


def write_plainly(out: pathlib.Path, users: dict[str, list[tuple[str, int]]]) -> None:
  with gzip.open(out, 'wt', compresslevel=6) as file:
    for user in sorted(users):
      items, times = zip(*users[user], strict=True)
      file.write(json.dumps({'user_id': user, 'item_ids': items, 'timestamps': times}) + '\n')


def without_repeats(history: list[tuple[str, int]]) -> list[tuple[str, int]]:
  history.sort(key=lambda event: event[1])
  return [event for place, event in enumerate(history) if place == 0 or event[0] != history[place - 1][0]]


def plain(paths: list[pathlib.Path], out: pathlib.Path) -> None:
  events = []
  for path in paths:
    with gzip.open(path) as file:
      for line in file:
        row = json.loads(line)
        events.append((row['reviewerID'], row['asin'], row['unixReviewTime']))
  before = None
  while before != (before := len(events)):
    users = collections.Counter(user for user, _, _ in events)
    items = collections.Counter(item for _, item, _ in events)
    events = [event for event in events if users[event[0]] >= K and items[event[1]] >= K]
  found = collections.defaultdict(list)
  for user, item, when in events:
    found[user].append((item, when))
  kept = {user: without_repeats(history) for user, history in found.items()}
  write_plainly(out, {user: history for user, history in kept.items() if len(history) >= SHORTEST})


def with_pandas(paths: list[pathlib.Path], out: pathlib.Path) -> None:
  columns = ['reviewerID', 'asin', 'unixReviewTime']
  events = pandas.concat([chunk[columns] for path in paths
                          for chunk in pandas.read_json(path, lines=True, chunksize=BLOCK, convert_dates=False)])
  before = None
  while before != (before := len(events)):
    for column in columns[:2]:
      counts = events[column].map(events[column].value_counts())
      events = events[counts >= K]
  events = events.sort_values(['reviewerID', 'unixReviewTime'], kind='stable')
  same = events['reviewerID'].eq(events['reviewerID'].shift()) & events['asin'].eq(events['asin'].shift())
  events = events[~same]
  events = events[events.groupby('reviewerID')['asin'].transform('size') >= SHORTEST]
  write_plainly(out, {user: list(zip(history['asin'], history['unixReviewTime'].tolist(), strict=True))
                      for user, history in events.groupby('reviewerID')})


def gunzip(paths: list[pathlib.Path], out: pathlib.Path) -> None:
  del out
  for path in paths:
    with igzip.open(path) as file:
      while file.read(1 << 20):
        pass


def measured(job, paths: list[pathlib.Path], out: pathlib.Path, *more: object) -> tuple[float, int, int]:
  """(seconds, bytes of memory at most, bytes that the folder of `out` grew by at most) of a job in a process of its own."""
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    before, most, ended = _size(out.parent), 0, threading.Event()
    running = pool.submit(_timed, job, paths, out, *more)
    running.add_done_callback(lambda _: ended.set())
    while not ended.wait(0.5):
      most = max(most, _size(out.parent) - before)
    return *running.result(), most


def _timed(job, *args: object) -> tuple[float, int]:
  begun = time.perf_counter()
  job(*args)
  return time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _size(folder: pathlib.Path) -> int:
  """Bytes of all files in a folder that changes meanwhile; a link counts as nothing."""
  total = 0
  for place, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.lstat(os.path.join(place, name)).st_size
  return total


def compare(work: pathlib.Path, n: int) -> dict:
  """Ours against both peers."""
  ratios = {}
  for files in (1, 8):
    folder = work / str(files)
    folder.mkdir()
    paths = generated(folder, n, files)
    seconds = {}
    for name, job in (('ours', ours), ('plain', plain), ('pandas', with_pandas), ('ours again', ours), ('gunzip', gunzip)):
      if name != 'pandas' or files == 1:
        seconds[name] = measured(job, paths, folder / name)[0]
    mean = (seconds['ours'] + seconds['ours again']) / 2
    rows = {name: _rows(folder / name) for name in ('plain', 'pandas') if name in seconds}
    data = histories.load(folder / 'ours')
    for name, found in rows.items():
      assert found == _as_rows(data), f'{name} made other histories'
    print(f'{n:,} reviews from {files} .gz: ' + ', '.join(f'{name} {value:.1f} s' for name, value in seconds.items()))
    ratios[files] = seconds['plain'] / mean
    if files == 1:
      ratios['pandas'], ratios['gunzip'] = seconds['pandas'] / mean, seconds['gunzip'] / mean
  return {'ratio': round(ratios[1], 2), 'eight_files': round(ratios[8], 2), 'pandas': round(ratios['pandas'], 2),
          'gunzip': round(ratios['gunzip'], 2)}


def _rows(path: pathlib.Path) -> list[tuple]:
  with gzip.open(path) as file:
    return [(row['user_id'], row['item_ids'], row['timestamps']) for row in map(json.loads, file)]


def _as_rows(data: histories.Histories) -> list[tuple]:
  places = list(zip(data.user_ids, data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True))
  items, times = [data.item_ids[item] for item in data.events.tolist()], data.timestamps.tolist()
  return [(user, items[begin:end], times[begin:end]) for user, begin, end in places]


def growth(work: pathlib.Path, n: int) -> dict:
  """A tenth of n reviews, and n, with DuckDB held to 2 GB; then n with a quarter of it, so that most of it goes to the disk."""
  found = []
  for size, limits in ((n // 10, (LIMIT_MB,)), (n, (LIMIT_MB, LIMIT_MB // 4))):
    folder = work / f'growth-{size}'
    folder.mkdir()
    paths = generated(folder, size, 1)
    for limit in limits:
      found.append(measured(ours, paths, folder / f'out-{limit}', f'{limit}MB'))
      seconds, memory, disk = found[-1]
      print(f'{size:,} reviews with {limit} MB: {seconds:.1f} s, {memory / 1e9:.2f} GB of memory, {disk / 1e9:.2f} GB of disk '
            f'beside the dump of {paths[0].stat().st_size / 1e9:.2f} GB')
    paths[0].unlink()
  few, many, (seconds, memory, disk) = found
  times, least = AMAZON_2018 / n, LIMIT_MB // 4 / 1000
  if disk > 1e8:  # fewer have room in memory, and tell nothing of more
    print(f'Amazon 2018, {AMAZON_2018:,} reviews, by the last: {times * seconds / 60:.0f} minutes; with {LIMIT_MB} MB '
          f'{LIMIT_MB / 1000 + times * (memory / 1e9 - least):.0f} GB of memory in all, '
          f'{times * (disk / 1e9 + least) - LIMIT_MB / 1000:.0f} GB of disk')
  return {'growth': round(many[0] / few[0], 1), 'memory_gb': round(many[1] / 1e9, 2), 'disk_gb': round(many[2] / 1e9, 2)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--reviews', type=int, default=1_000_000)
  parser.add_argument('--growth', type=int, help='instead: so many reviews, and a tenth of them')
  parser.add_argument('--work', help='a folder with room (default: the one for temporary files)')
  parser.add_argument('--quick', action='store_true', help='20,000 reviews, for both')
  options = parser.parse_args()
  result = {'name': 'prepare_speed', 'peer': 'a plain Python loop: gzip, json, dictionaries'}
  with tempfile.TemporaryDirectory(dir=options.work) as work:
    if options.quick or not options.growth:
      n = 20_000 if options.quick else options.reviews
      result |= compare(pathlib.Path(work), n) | {'reviews': n}
    if options.quick or options.growth:
      result |= growth(pathlib.Path(work), 20_000 if options.quick else options.growth)
  print(json.dumps(result))


if __name__ == '__main__':
  main()
