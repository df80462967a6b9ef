"""`calrec describe`: as text, as JSON, as a page that has all that the text says and stays a page whatever the titles are."""

import json
import re

import fsspec
import pytest
from html_page_parser import Page
from refusals import refused
from small_shop import write_lines

from calrec_jax import cli
from calrec_jax.data import histories
from calrec_jax.description import page as page_lib
from calrec_jax.description import tables
from calrec_jax.description.describe import describe
from calrec_jax.text.templates import ItemTemplate

HOSTILE = '</style><script>alert(1)</script><img src=x onerror=alert(1)>\u202e<!-- & "\' http://elsewhere.example/x'
TITLES = [HOSTILE, HOSTILE, 'Rope', '', 'Rope']


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  """A prepared folder, `data`, and `vocabulary.json`."""
  place = tmp_path_factory.mktemp('described')
  items = [{'item_id': f'<i>{number}', 'title': title, 'category': HOSTILE, 'price': '$1'}
           for number, title in enumerate(TITLES)]
  write_lines(place / 'items.jsonl', items)
  write_lines(place / 'sequences.jsonl', [
      {'user_id': f'<u>{user}', 'item_ids': [f'<i>{(user + step) % 5}' for step in range(4 + user)],
       'timestamps': [10**9 + 86_400 * 40 * (step // 2) for step in range(4 + user)]} for user in range(9)])
  histories.prepare(place / 'sequences.jsonl', place / 'items.jsonl', name='shop', out=place / 'data', progress=False)
  assert cli.main(['vocabulary', '--data', str(place / 'data'), '--size', '400', '--out', str(place / 'vocabulary.json')]) == 0
  return place


@pytest.fixture(scope='module')
def found(shop):
  return describe(shop / 'data', template=ItemTemplate(), vocabulary=shop / 'vocabulary.json', length=400, item_length=150)


@pytest.fixture(scope='module')
def text(found):
  return page_lib.page(found)


@pytest.fixture(scope='module')
def page(text):
  return Page(text)


def test_the_page_is_whole(page):
  assert not page.open and not page.wrong
  assert page.of('title')[0][1] == 'Data set shop' and len(page.of('h1')) == 1
  assert [said for _, said in page.of('h2')] == list(page_lib.SECTIONS.values())
  ids = [found['id'] for _, found, _ in page.elements if 'id' in found]
  assert len(ids) == len(set(ids))
  assert len(page.of('svg', role='img')) == 6
  for found, said in page.of('svg', role='img'):
    assert found['aria-label'] and found['width'].isdigit() and found['height'].isdigit() and said  # no layout shift


def test_the_page_asks_for_nothing_and_runs_nothing(page, text):
  assert not page.of('script') and not page.of('img') and not page.of('link')
  for _, found, _ in page.elements:
    assert not [key for key in found if key.startswith('on') or key in ('src', 'style')]
    assert found.get('href', '#').startswith('#')
    assert not [value for key, value in found.items() if key != 'aria-label' and '://' in value]
  assert 'url(' not in text and '@import' not in text
  policy = page.of('meta', **{'http-equiv': 'Content-Security-Policy'})[0][0]['content']
  assert "default-src 'none'" in policy and 'script-src' not in policy
  assert 'prefers-color-scheme: dark' in text and '@media print' in text and 'width=device-width' in text


def test_titles_are_texts(page):
  cells = [said for _, said in page.of('td')]
  assert any('<script>alert(1)</script><img' in cell for cell in cells)
  assert any(cell.startswith('<i>') for cell in cells)
  assert not [cell for cell in cells if not cell.isprintable()]


def test_the_page_has_all_that_the_text_says(page, found):
  shown = [said for name in ('th', 'td', 'figcaption') for _, said in page.of(name)]
  for table in tables.tables(found):
    assert table.caption in shown
    for cell in [*table.columns, *(cell for row in table.rows for cell in row)]:
      assert cell in shown
  numbers = set(re.findall(r'\d[\d,.]*', tables.as_text(found)))
  everything = page.of('main')[0][1]
  assert len(numbers) > 60 and not [number for number in numbers if number not in everything]


def test_the_text_is_aligned_and_has_the_numbers(found):
  lines = tables.as_text(found).splitlines()
  assert '  users        9' in lines and '  items        5' in lines and '  events       72' in lines
  assert any(re.fullmatch(r'  events of a history +8\.00 +4 +4 +6 +8 +10 +12 +12 +12', line) for line in lines)
  assert any(re.match(r'  title unknown +1 +20\.0% +\d+\.\d% +<i>3 \(no title\)', line) for line in lines)
  head = lines.index(next(line for line in lines if line.split()[:3] == ['length', 'histories', 'cut']))
  assert len({len(line) for line in lines[head:head + len(found['tokens']['training']) + 1]}) == 1
  assert all(line.isprintable() for line in lines)


def test_the_verb_prints_text_or_json_and_writes_the_page(shop, found, text, tmp_path, capsys):
  arguments = ['describe', str(shop / 'data'), '--vocabulary', str(shop / 'vocabulary.json'), '--length', '400',
               '--item_length', '150']
  assert cli.main([*arguments, '--html', str(tmp_path / 'page.html')]) == 0
  assert capsys.readouterr().out == f'{tables.as_text(found)}\n\nWrote {tmp_path / "page.html"}.\n'
  assert (tmp_path / 'page.html').read_text(encoding='utf-8') == text
  assert cli.main([*arguments, '--json']) == 0
  assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
  assert sorted(path.name for path in (shop / 'data').iterdir()) == ['dataset.json', 'items.jsonl.gz', 'sequences.jsonl.gz']


def test_a_folder_of_two_files_and_a_bucket_are_described_too(shop, found, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('CALREC_CACHE', str(tmp_path / 'cache'))
  memory = fsspec.filesystem('memory')
  for name in ('sequences.jsonl.gz', 'items.jsonl.gz'):
    memory.pipe(f'/described/{name}', (shop / 'data' / name).read_bytes())
  assert cli.main(['describe', 'memory://described', '--html', 'memory://described.html', '--json']) == 0
  bare = json.loads(capsys.readouterr().out)
  assert bare['name'] == 'described' and bare['preparation'] == {} and bare['tokens'] is None
  assert bare['fingerprint'] == found['fingerprint'] and bare['problems'] == found['problems']
  shown = Page(memory.cat('/described.html').decode())
  assert not shown.wrong and 'Preparation' not in [said for _, said in shown.of('h2')]
  memory.rm('/described', recursive=True)
  memory.rm('/described.html')


def test_similar_ids_are_told(found, tmp_path):
  assert found['similar_ids'] == {'users': 0, 'items': 0} and 'similar ids' not in tables.as_text(found)
  write_lines(tmp_path / 'items.jsonl', [{'item_id': item} for item in ('a', 'A', 'b')])
  write_lines(tmp_path / 'sequences.jsonl', [{'user_id': user, 'item_ids': ['a', 'A', 'b']} for user in ('ann', ' Ann', 'bob')])
  told = describe(tmp_path, template=ItemTemplate())
  assert told['similar_ids'] == {'users': 2, 'items': 2}
  assert re.search('similar ids +2 users and 2 items have the id of another one', tables.as_text(told))
  assert re.search('id of another item but for case and blanks +2 ', tables.as_text(told))


def test_what_dataset_json_tells_is_shown(shop, tmp_path):
  told = json.loads((shop / 'data/dataset.json').read_text())
  told |= {'steps': [{'step': 'k-core', 'dropped': 12}, {'step': 'none', 'dropped': 0}], 'bad_lines': 3,
           'metadata': {'lines': 7}}
  (tmp_path / 'data').mkdir()
  for name in ('sequences.jsonl.gz', 'items.jsonl.gz'):
    (tmp_path / 'data' / name).write_bytes((shop / 'data' / name).read_bytes())
  (tmp_path / 'data/dataset.json').write_text(json.dumps(told))
  shown = tables.as_text(describe(tmp_path / 'data', template=ItemTemplate()))
  assert re.search(r'dropped: k-core +12 events\n  broken lines +3\n  metadata +lines 7\n  options', shown)
  assert 'dropped: none' not in shown


def refusal(capsys, *arguments):
  """The one line of a command that is refused."""
  assert cli.main(['describe', *map(str, arguments)]) == 2
  out, err = capsys.readouterr()
  [line] = [line for line in err.splitlines() if 'error:' in line]
  assert not out and 'Traceback' not in err
  return line


def test_wrong_inputs_are_named_and_nothing_is_written(shop, tmp_path, capsys):
  data, out, vocabulary = shop / 'data', tmp_path / 'page.html', shop / 'vocabulary.json'
  assert 'no such folder' in refusal(capsys, tmp_path / 'absent', '--html', out)
  assert 'absent.json' in refusal(capsys, data, '--vocabulary', tmp_path / 'absent.json', '--html', out)
  assert "text.fields = ('colour',)" in refusal(capsys, data, '--fields', 'colour', '--html', out)
  assert '--length 20' in refusal(capsys, data, '--vocabulary', vocabulary, '--length', '20', '--html', out)
  assert list(tmp_path.iterdir()) == []
  out.write_text('mine')
  assert 'already there' in refusal(capsys, data, '--html', out)
  assert out.read_text() == 'mine'
  refused(lambda: page_lib.write(describe(data, template=ItemTemplate()), out / 'page.html'), 'cannot be written')
  (tmp_path / 'data').mkdir()
  write_lines(tmp_path / 'data/items.jsonl', [{'item_id': 'a'}])
  write_lines(tmp_path / 'data/sequences.jsonl', [{'user_id': 'u', 'item_ids': ['a', 'ghost']}])
  assert "unknown item 'ghost'" in refusal(capsys, tmp_path / 'data')
