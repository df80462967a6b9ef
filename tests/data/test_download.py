"""`calrec download amazon`: what it tells before it fetches, what it leaves, and what it refuses."""

import gzip
import hashlib
import io
import json
import re
import shutil
import sys

import pytest
from file_server import FileServer

from calrec_jax import cli
from calrec_jax.data import amazon_releases, download

PACKED = {name: gzip.compress(name.encode() * 99, mtime=0) for name in ('reviews', 'meta')}
SMALL = {'/categoryFilesSmall/Gift_Cards_5.json.gz': PACKED['reviews'], '/metaFiles2/meta_Gift_Cards.json.gz': PACKED['meta']}


pytestmark = pytest.mark.usefixtures('no_waits')


@pytest.fixture
def server():
  with FileServer(SMALL) as server:
    yield server


@pytest.fixture
def command(server, tmp_path):
  """The words of a command, as a function of more of them."""
  return lambda *more: ['download', 'amazon', '--year', '2018', '--category', 'Gift_Cards', '--five_core', '--mirror',
                        server.url, '--out', str(tmp_path / 'dumps'), *more]


def test_the_table_has_the_releases_as_published():
  releases = amazon_releases.RELEASES
  assert {year: len(release.categories) for year, release in releases.items()} == {2014: 24, 2018: 29, 2023: 34}
  assert {year: len(release.without_five_core) for year, release in releases.items()} == {2014: 0, 2018: 0, 2023: 6}
  for release in releases.values():
    assert len(set(release.categories)) == len(release.categories) and {*release.without_five_core} < {*release.categories}
    assert release.page in release.note and release.papers in release.note and release.note.count('\n') == 2
    assert not any(base.endswith('/') for base in release.bases)


@pytest.mark.parametrize(('year', 'ratings', 'end'), [
    (2014, 'ratings_Baby.csv', 'http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Baby.csv'),
    (2018, 'Gift_Cards.csv',
     'https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/categoryFilesSmall/Gift_Cards.csv'),
    (2023, 'Software.csv.gz',
     'https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_2023/benchmark/0core/rating_only/Software.csv.gz')])
def test_addresses_of_ratings(year, ratings, end):
  category = re.search('Baby|Gift_Cards|Software', ratings)[0]
  release = amazon_releases.RELEASES[year]
  found, meta = amazon_releases.addresses(year, [category], ratings=True)
  assert end in [found.replace(release.bases[0], base) for base in release.bases] and found.endswith(ratings)
  assert meta == amazon_releases.addresses(year, [category])[1]


@pytest.mark.parametrize(('year', 'five_core', 'ends'), [
    (2014, False, ['/productGraph/categoryFiles/reviews_Baby.json.gz', '/productGraph/categoryFiles/meta_Baby.json.gz']),
    (2014, True, ['/productGraph/categoryFiles/reviews_Baby_5.json.gz', '/productGraph/categoryFiles/meta_Baby.json.gz']),
    (2018, False, ['/amazon_v2/categoryFiles/Software.json.gz', '/amazon_v2/metaFiles2/meta_Software.json.gz']),
    (2018, True, ['/amazon_v2/categoryFilesSmall/Software_5.json.gz', '/amazon_v2/metaFiles2/meta_Software.json.gz']),
    (2023, False, ['/raw/review_categories/Unknown.jsonl.gz', '/raw/meta_categories/meta_Unknown.jsonl.gz']),
    (2023, True, ['/benchmark/5core/rating_only/Unknown.csv.gz', '/raw/meta_categories/meta_Unknown.jsonl.gz'])])
def test_addresses(year, five_core, ends):
  category = re.search('Baby|Software|Unknown', ends[0])[0]
  found = amazon_releases.addresses(year, [category, category], five_core=five_core)
  assert len(found) == 2 and all(address.endswith(end) for address, end in zip(found, ends, strict=True))
  mirrored = amazon_releases.addresses(year, [category], five_core=five_core, mirror='http://x/y/')
  base = amazon_releases.RELEASES[year].bases[0]
  assert [address.replace(base, 'http://x/y') for address in found] == mirrored


def test_what_is_fetched_and_recorded(server, command, tmp_path, capsys):
  assert cli.main(command('--yes')) == 0
  out, told = capsys.readouterr()
  for path, content in SMALL.items():
    assert (tmp_path / 'dumps' / path.rpartition('/')[2]).read_bytes() == content
    assert re.search(rf'^ +{len(content)} bytes  {server.url}{path}$', told, re.M)
  assert f'{sum(map(len, SMALL.values()))} bytes  to fetch, into {tmp_path / "dumps"}' in told
  assert 'ask to cite J. Ni' in told and amazon_releases.RELEASES[2018].page in told
  assert '2 files' in out and 'calrec prepare dumps' in out
  files = json.loads((tmp_path / 'dumps/downloads.json').read_text())['files']
  assert sorted(path.name for path in (tmp_path / 'dumps').iterdir()) == sorted(['downloads.json', *files])
  for path, content in SMALL.items():
    record = files[path.rpartition('/')[2]]
    assert (record['address'], record['size'], record['sha256']) == (
        server.url + path, len(content), hashlib.sha256(content).hexdigest())
    assert record['release'] == 'Amazon Review Data (2018)' and re.match(r'20\d\d-\d\d-\d\dT.*\+00:00', record['date'])


def test_ratings_are_fetched_and_prepared(server, tmp_path, capsys):
  users, items = [f'A{number:012}' for number in range(5)], [f'B{number:09}' for number in range(5)]
  server.files = {
      '/categoryFilesSmall/Software.csv': ''.join(
          f'{item},{user},{3 + day % 3}.0,{1_400_000_000 + day * 86_400}\n' for user in users for day, item in enumerate(items)
      ).encode(),
      '/metaFiles2/meta_Software.json.gz': gzip.compress(
          b''.join(json.dumps({'asin': item, 'title': f'Title {item}'}).encode() + b'\n' for item in items))}
  dumps, data = str(tmp_path / 'dumps'), str(tmp_path / 'data')
  fetch = [
      'download', 'amazon', '--year', '2018', '--category', 'Software', '--ratings', '--out', dumps, '--mirror', server.url]
  server.cues['/categoryFilesSmall/Software.csv'] = ['half', '403']
  failed(capsys, [*fetch, '--yes'], 'Software.csv', 'answers 403')
  server.cues.clear()
  assert cli.main([*fetch, '--yes']) == 0
  half = len(server.files['/categoryFilesSmall/Software.csv']) // 2
  assert server.contents_asked('/categoryFilesSmall/Software.csv')[-1] == f'bytes={half}-'
  assert (tmp_path / 'dumps/Software.csv').read_bytes() == server.files['/categoryFilesSmall/Software.csv']
  capsys.readouterr()
  assert cli.main(['prepare', 'dumps', '--dumps', dumps, '--out', data, '--json']) == 0
  [made] = json.loads(capsys.readouterr().out)
  assert made['sources'][0]['format'] == 'Amazon 2018 ratings' and made['statistics']['events'] == 25
  assert made['statistics']['unknown']['title'] == 0


def test_what_is_here_is_neither_asked_for_nor_about(server, command, tmp_path, capsys):
  assert cli.main(command('--yes')) == 0
  before = {path: path.read_bytes() for path in (tmp_path / 'dumps').iterdir()}
  server.asked.clear()
  capsys.readouterr()
  assert cli.main(command('--json')) == 0  # and no --yes
  out, told = capsys.readouterr()
  assert json.loads(out)['fetched'] == {'files': 0, 'bytes': 0} and not told and not server.asked
  assert {path: path.read_bytes() for path in (tmp_path / 'dumps').iterdir()} == before
  (tmp_path / 'dumps/Gift_Cards_5.json.gz').unlink()
  assert cli.main(command('--yes')) == 0
  out, told = capsys.readouterr()
  assert '2 files' in out and '1 of them from before' in out and re.search('here  .*meta_Gift_Cards', told)
  assert len(server.contents_asked('/categoryFilesSmall/Gift_Cards_5.json.gz')) == 1
  assert not server.contents_asked('/metaFiles2/meta_Gift_Cards.json.gz')


def test_another_mirror_goes_on_with_the_rest(server, command, tmp_path):
  assert cli.main(command('--yes')) == 0
  (tmp_path / 'dumps/Gift_Cards_5.json.gz').unlink()
  with FileServer(SMALL) as other:
    assert cli.main([other.url if word == server.url else word for word in command('--yes')]) == 0
  files = json.loads((tmp_path / 'dumps/downloads.json').read_text())['files']
  assert files['Gift_Cards_5.json.gz']['address'].startswith(other.url)
  assert files['meta_Gift_Cards.json.gz']['address'].startswith(server.url)


def test_a_whole_file_without_a_record_is_taken(server, command, tmp_path):
  """As a command leaves it that is killed between the two."""
  assert cli.main(command('--yes')) == 0
  record = tmp_path / 'dumps/downloads.json'
  before = json.loads(record.read_text())['files']
  record.unlink()
  (tmp_path / 'dumps/Gift_Cards_5.json.gz.partial.json').write_text('{}')
  server.asked.clear()
  assert cli.main(command()) == 0
  after = json.loads(record.read_text())['files']
  assert all(before[name] == after[name] | {'date': before[name]['date']} for name in before)
  assert not any(server.contents_asked(path) for path in SMALL)
  assert not (tmp_path / 'dumps/Gift_Cards_5.json.gz.partial.json').exists()


@pytest.mark.parametrize(('answer', 'fetched'), [('y\n', True), ('YES\n', True), ('n\n', False), ('\n', False), ('', False)])
def test_it_asks(server, command, tmp_path, monkeypatch, capsys, answer, fetched):
  class Terminal(io.StringIO):
    def isatty(self) -> bool:
      return True
  monkeypatch.setattr(sys, 'stdin', Terminal(answer))
  assert cli.main(command()) == 0
  out, told = capsys.readouterr()
  assert 'Fetch them? [y/N]' in told and ('Nothing was fetched.' in out) != fetched
  assert (tmp_path / 'dumps').exists() == fetched
  assert any(method == 'GET' and path in SMALL for method, path, _ in server.asked) == fetched


def failed(capsys, arguments: list[str], *words: str) -> None:
  """The command is refused in one line, the last one, that has these words."""
  capsys.readouterr()
  assert cli.main(arguments) == 2
  out, told = capsys.readouterr()
  errors = [line for line in told.splitlines() if 'error:' in line]
  assert len(errors) == 1 and told.splitlines()[-1] == errors[0] and not out, told
  for word in words:
    assert word in errors[0]


def test_without_a_terminal_nothing_is_fetched(server, command, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('y\n'))
  failed(capsys, command(), 'no terminal', '--yes')
  assert not (tmp_path / 'dumps').exists() and not any(server.contents_asked(path) for path in SMALL)


@pytest.mark.parametrize(('more', 'words'), [
    (['--year', '2019'], ['2019', '2014, 2018, 2023']),
    (['--category', 'Gift_Cards', 'Gift Cards'], ['Gift Cards', 'no file of that name', 'AMAZON_FASHION', 'Video_Games']),
    (['--year', '2014'], ['Gift_Cards', '(2014)', 'Amazon_Instant_Video']),
    (['--ratings'], ['--five_core and --ratings', 'choose one']),
    (['--year', '2023', '--category', 'Appliances'], ['Appliances', 'of a 5-core', 'All_Beauty']),
    (['--mirror', 'ftp://x/y'], ['--mirror ftp://x/y', 'no address']), (['--mirror', 'http://x y/'], ['no address']),
    (['--mirror', 'http://[x/'], ['no address']), (['--mirror', 'dumps'], ['no address']),
    (['--mirror', 'http://x/?a=b'], ['no address']), (['--out', 'gs://bucket/x'], ['gs://bucket/x', 'this machine']),
    (['--out', __file__], [__file__, 'is a file']), (['--out', __file__ + '/x'], [__file__, 'is a file']),
])
def test_wrong_words(command, capsys, more, words):
  failed(capsys, command('--yes', *more), *words)


def test_a_file_that_the_server_lacks(server, command, tmp_path, capsys):
  failed(capsys, command('--yes', '--category', 'Gift_Cards', 'Software'), 'Software_5.json.gz: there is no such file (404',
         'has AMAZON_FASHION', 'Video_Games', '--mirror https://')
  assert not (tmp_path / 'dumps').exists()


def test_a_file_that_goes_after_the_question(server, command, capsys):
  server.cues['/categoryFilesSmall/Gift_Cards_5.json.gz'] = ['404']
  failed(capsys, command('--yes'), 'there is no such file (404', 'though its size was told', '--mirror')


def test_what_lies_in_the_way(server, command, tmp_path, capsys):
  reviews, record = tmp_path / 'dumps/Gift_Cards_5.json.gz', tmp_path / 'dumps/downloads.json'
  reviews.parent.mkdir()
  reviews.write_text('mine')
  failed(capsys, command('--yes'), str(reviews), 'something else', 'choose another --out')
  reviews.write_bytes(bytes(len(PACKED['reviews'])))
  failed(capsys, command('--yes'), str(reviews), 'is not the file', 'Remove it')
  reviews.unlink()
  reviews.mkdir()
  failed(capsys, command('--yes'), str(reviews), 'something else')
  reviews.rmdir()
  assert cli.main(command('--yes')) == 0
  reviews.write_bytes(PACKED['reviews'][:9])
  failed(capsys, command('--yes'), str(reviews), 'has 9 bytes, and had', 'remove it')
  reviews.write_bytes(PACKED['reviews'])
  text = record.read_text()
  record.write_text(text.replace('(2018)', '(2014)'))
  failed(capsys, command('--yes'), 'is of Amazon Review Data (2014), and that of Amazon Review Data (2018)', '--out')
  for wrong in ('{"files": {"a": 1}}', '{', '[]', '{}'):
    record.write_text(wrong)
    failed(capsys, command('--yes'), 'downloads.json', 'restore')


def test_sizes_that_a_server_does_not_tell(server, command, capsys):
  server.knows_head = False
  server.cues['/metaFiles2/meta_Gift_Cards.json.gz'] = ['chunked']
  assert cli.main(command('--yes')) == 0
  told = capsys.readouterr().err
  assert re.search('^ +unknown  .*/meta_Gift_Cards', told, re.M)
  assert f'more than {len(PACKED["reviews"])} bytes  to fetch' in told


def test_what_is_left_of_a_file_is_told(server, command, tmp_path, capsys):
  server.cues['/categoryFilesSmall/Gift_Cards_5.json.gz'] = ['half', '403']
  failed(capsys, command('--yes'), 'answers 403')
  server.cues.clear()
  half = len(PACKED['reviews']) // 2
  assert cli.main(command('--yes', '--json')) == 0
  out, told = capsys.readouterr()
  assert re.search(rf'Gift_Cards_5.json.gz  \({half} bytes of it are here\)$', told, re.M)
  left = sum(map(len, PACKED.values())) - half
  assert f'{left} bytes  to fetch' in told and json.loads(out)['fetched'] == {'files': 2, 'bytes': left}


def test_too_small_a_disk(command, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 0, 10))
  failed(capsys, command('--yes'), 'bytes are to be fetched, and 10 bytes are free', 'make room')
  assert not (tmp_path / 'dumps').exists()


def test_what_came_before_a_failure_stays(server, command, tmp_path, capsys):
  server.cues['/metaFiles2/meta_Gift_Cards.json.gz'] = ['503']
  failed(capsys, command('--yes'), 'meta_Gift_Cards.json.gz', 'answers 503', 'the same command again')
  assert {path.name for path in (tmp_path / 'dumps').iterdir()} == {'Gift_Cards_5.json.gz', 'downloads.json'}
  server.cues.clear()
  server.asked.clear()
  assert cli.main(command('--yes')) == 0
  assert not server.contents_asked('/categoryFilesSmall/Gift_Cards_5.json.gz')
  assert (tmp_path / 'dumps/meta_Gift_Cards.json.gz').read_bytes() == PACKED['meta']


def test_sizes():
  assert [download._size(n) for n in (None, 0, 999, 1000, 12_345_678, 2_500_000_000)] == [
      'unknown', '0 bytes', '999 bytes', '1.0 kB', '12.3 MB', '2.5 GB']
