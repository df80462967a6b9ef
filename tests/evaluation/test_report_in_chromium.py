"""The page of `calrec report` in a browser: legible, by keyboard, in print, without network, and nothing in it runs or jumps.

Chromium runs without a driver: an outer page holds the report once for each width, looks into it, and is dumped as it is then.
"""

import html
import html.parser
import http.server
import json
import re
import subprocess
import threading

import pytest
from small_shop import write_lines, write_shop

from calrec_jax.data import histories as histories_lib
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.evaluation.report.report import report
from calrec_jax.text.templates import ItemTemplate

pytestmark = pytest.mark.chromium

IMAGE = '<img src=x onerror="document.title=\'owned\'">'
SCRIPT = "</script><script>document.title='owned'</script>"
TITLES = ['Strong Glue', IMAGE, 'Garden Hose of fifty feet, with a nozzle of brass and two spare washers, for cold months',
          SCRIPT, 'Duct Tape', 'Unbroken' * 16, 'Rope', 'Steel Hose', 'Only once']
USERS = {f'shopper-{number}': [(number + step * (1 + number % 3)) % 8 for step in range(4 + number % 3)]
         for number in range(13)}
USERS['shopper-of-the-new'] = [0, 1, 2, 8]  # its target is cold
TITLE = 'Evaluation of data, test split'
SIZES = {'phone': 390, 'small': 320, 'desktop': 1280}  # CSS pixels
PAPER = 718  # A4 with margins of 1 cm
WORDS = ['shopper-of-the-new', 'STRONG glue', 'onerror', 'rope sort', 'no such word']

# Stands first in the page, before its policy: who listens for clicks, and (`WATCH`) what jumps and what is loaded.
LISTEN = """<script>
window.clicked = [];
const listen = EventTarget.prototype.addEventListener;
EventTarget.prototype.addEventListener = function (kind, ...rest) {
  if (kind === 'click') window.clicked.push(this);
  return listen.call(this, kind, ...rest);
};
</script>"""
WATCH = """<script>
const shifts = [], frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
new PerformanceObserver((list) => shifts.push(...list.getEntries())).observe({ type: 'layout-shift', buffered: true });
const painted = new Promise((done) => new PerformanceObserver(done).observe({ type: 'paint', buffered: true }));
addEventListener('load', async () => {
  await painted;
  await new Promise((done) => setTimeout(done, 1000));
  await frame();
  await frame();
  window.found = { shifts: shifts.map((each) => [each.value, ...each.sources.map((source) => source.node?.nodeName)]),
    loaded: performance.getEntriesByType('resource').map((each) => each.name), title: document.title };
});
</script>"""
JUMP = """<script>painted.then(frame).then(() => {
  const late = document.createElement('div');
  late.style.height = '90px';
  document.body.prepend(late);
});</script>"""
MICE = """<p id="mouse" tabindex="-1">x</p><b tabindex="3">y</b><script>
document.getElementById('mouse').addEventListener('click', () => 0);
</script>"""

# What the outer page asks of each frame; `win` is the window of the frame.
TOOLS = r"""
const numbers = (text) => {
  const inside = text.match(/^rgba?\(([^)]+)\)$/);
  if (!inside) throw new Error('colour ' + text);
  const parts = inside[1].split(/[ ,/]+/).map(Number);
  return parts.length < 4 ? [...parts, 1] : parts;
};
const luminance = (colour) => {
  const [r, g, b] = colour.map((each) => each / 255 <= 0.04045 ? each / 255 / 12.92 : ((each / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, two) => {
  const [low, high] = [luminance(one), luminance(two)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const solid = (colour) => { if (colour[3] < 1) throw new Error('a colour that one sees through'); return colour; };
const ground = (win, element) => {
  for (let each = element; each; each = each.parentElement) {
    const style = win.getComputedStyle(each);
    if (style.opacity !== '1' || style.backgroundImage !== 'none') throw new Error('opacity or image behind ' + each.outerHTML);
    const colour = numbers(style.backgroundColor);
    if (colour[3]) return solid(colour);
  }
  throw new Error('no background behind ' + element.outerHTML);
};
const seen = (win, chosen) => [...win.document.querySelectorAll(chosen)].filter((each) => each.getClientRects().length);
const name = (element) => `${element.localName}#${element.id}.${element.className}`;
const written = (win) => {  // [element, its text] of all that is seen
  const doc = win.document, found = [], walk = doc.createTreeWalker(doc.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const range = doc.createRange(), node = walk.currentNode;
    range.selectNodeContents(node);
    if (node.data.trim() && range.getClientRects().length) found.push([node.parentElement, node.data]);
  }
  for (const field of seen(win, 'input, select')) found.push([field, field.id]);
  return found;
};
const texts = (win, least = 11) => {
  const found = { texts: 0, faint: [], small: [] };
  for (const [element, text] of written(win)) {
    const style = win.getComputedStyle(element), drawn = element instanceof win.SVGElement;
    const size = parseFloat(style.fontSize) * (drawn ? element.getScreenCTM().a : 1);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = contrast(solid(numbers(drawn ? style.fill : style.color)), ground(win, element));
    found.texts += 1;
    if (ratio < (large ? 3 : 4.5)) found.faint.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
    if (size < least) found.small.push(`${text.slice(0, 40)}: ${size.toFixed(1)} px`);
  }
  return found;
};
const boxes = (win) => {  // what is wider than its place: the page, and boxes that scroll (or should)
  const root = win.document.documentElement, all = [...win.document.querySelectorAll('body *')];
  const wide = all.filter((each) => each.clientWidth && each.scrollWidth > each.clientWidth);
  const scrolls = (each) => ['auto', 'scroll'].includes(win.getComputedStyle(each).overflowX);
  const hides = (each) => ['hidden', 'clip'].includes(win.getComputedStyle(each).overflowX);
  const sized = (each) => each.hasAttribute('width') && each.hasAttribute('height');
  return { scroll: root.scrollWidth, client: root.clientWidth, scrolling: wide.filter(scrolls).length,
    unreachable: wide.filter(scrolls).filter((each) => each.tabIndex < 0 || !each.hasAttribute('tabindex')).map(name),
    hiding: [root, win.document.body, ...all].filter(hides).filter((each) => !each.matches('input, select, svg')).map(name),
    unsized: all.filter((each) => each.matches('svg, img, canvas') && !sized(each)).map(name) };
};
const look = (win) => {
  const doc = win.document;
  const field = doc.getElementById('size');
  field.value = '1000';
  field.dispatchEvent(new Event('input'));
  for (const each of doc.querySelectorAll('details')) each.open = true;
  return { ...texts(win), ...boxes(win), dark: win.matchMedia('(prefers-color-scheme: dark)').matches,
    ground: luminance(ground(win, doc.body)), width: win.innerWidth };
};
"""
KEYS = r"""
const STYLES = ['outlineStyle', 'outlineWidth', 'boxShadow', 'borderColor', 'borderWidth', 'borderStyle'];
const keys = async (win) => {
  const doc = win.document, style = (each) => STYLES.map((key) => win.getComputedStyle(each)[key]).join(' ');
  for (const each of doc.querySelectorAll('details')) each.open = true;
  const all = seen(win, 'a, button, input, select, summary, [tabindex]');
  const native = 'a[href], button, input, select, summary, [tabindex]';
  const found = { seen: all.map((each) => each.localName), refuse: [], plain: [],
    clicks: win.clicked.map((each) => each.localName),
    mice: [...win.clicked.filter((each) => each instanceof win.Element), ...doc.querySelectorAll('[onclick], [role=button]')]
      .filter((each) => !each.matches(native) || each.tabIndex < 0).map(name),
    positive: [...doc.querySelectorAll('[tabindex]')].filter((each) => each.tabIndex > 0).map(name) };
  for (const each of all) {
    const before = style(each);
    each.focus();
    if (doc.activeElement !== each) found.refuse.push(name(each));
    if (style(each) === before) found.plain.push(name(each));
    if (each.className === 'skip') found.skip = each.getBoundingClientRect().left >= 0;
    each.blur();
  }
  const next = doc.getElementById('after'), shown = () => doc.querySelectorAll('.example.on').length;
  next.focus();
  next.click();
  await new Promise((done) => win.requestAnimationFrame(() => setTimeout(done, 100)));  // a focus is lost a little later
  found.last = { shown: shown(), kept: doc.activeElement === next, style: style(next) };
  next.click();
  found.beyond = shown();
  return found;
};
"""
SEARCH = r"""
const search = (win) => {
  const doc = win.document, get = (id) => doc.getElementById(id);
  const put = (id, value) => { get(id).value = value; get(id).dispatchEvent(new win.Event('input', { bubbles: true })); };
  const shown = () => seen(win, 'article').map((each) => each.querySelector('h3').textContent.replace('User ', ''));
  const told = () => get('status').textContent;
  const found = { first: shown(), first_told: told(), searches: {}, filters: {} };
  get('after').click();
  found.second = shown();
  get('before').click();
  found.back = shown();
  put('size', '1000');
  for (const text of WORDS) { put('search', text); found.searches[text] = [shown(), told()]; }
  put('search', '');
  found.all = shown();
  for (const id of ['hit', 'target']) for (const option of get(id).options) {
    put(id, option.value);
    found.filters[`${id} ${option.value}`] = shown();
    put(id, '');
  }
  put('target', 'repeat');
  put('search', 'shopper-1');
  found.both = shown();
  found.wide = doc.body.getBoundingClientRect().width;
  doc.querySelector('main').hidden = true;
  found.wide_when_short = doc.body.getBoundingClientRect().width;
  return found;
};
"""
OTHERS = r"""
const print = (win) => {  // the rules for print, as if the frame were paper
  for (const rule of win.document.styleSheets[0].cssRules) if (rule.media?.mediaText === 'print') rule.media.mediaText = 'all';
  return { ...texts(win, 9), ...boxes(win), ground: luminance(ground(win, win.document.body)),
    controls: seen(win, 'input, select, button, nav, .skip').map(name), examples: seen(win, 'article').length };
};
const plain = (win) => ({ examples: seen(win, 'article').length, controls: seen(win, '.controls *').length });
const title = (win) => ({ title: win.document.title, images: win.document.images.length, scripts: win.document.scripts.length,
  items: [...win.document.querySelectorAll('li')].map((each) => each.textContent) });
"""
RUN = r"""
addEventListener('load', () => setTimeout(async () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) {
    try {
      frame.contentWindow.focus();
      found[frame.id] = await CHECKS[frame.name](frame.contentWindow);
    } catch (error) {
      found[frame.id] = { error: String(error) };
    }
  }
  for (const frame of document.querySelectorAll('iframe')) frame.remove();
  document.getElementById('result').textContent = JSON.stringify(found);
}, 500));
"""


def first(page, script):
  """The page with a script before its policy, which then binds what comes after it only."""
  return page.replace('<head>', f'<head>{script}', 1)


def planted(page, *, body='', style=''):
  """A page with a flaw, and without the policy that might keep it from showing."""
  page, n_policies = re.subn(r'<meta http-equiv="Content-Security-Policy".*?>', '', page)
  assert n_policies == 1
  return page.replace('</main>', f'{body}</main>', 1).replace('</style>', f'{style}</style>', 1)


def outer(frames, words):
  """The page with the frames {name: (check, width, HTML)}; a check `plain` gets a frame without scripts."""
  inside = ''.join(
    f'<iframe id="{name}" name="{check}" style="width:{width}px;height:800px;border:0" ' + (
      f'sandbox="allow-same-origin" srcdoc="{html.escape(page)}"' if check == 'plain' else
      f'srcdoc="{html.escape(first(page, LISTEN))}"') + '></iframe>'
    for name, (check, width, page) in frames.items())
  checks = 'const CHECKS = { look, keys, search, print, plain, title };'
  return (f'<!DOCTYPE html><meta charset="utf-8"><style>:root {{ color-scheme: light dark }}</style><pre id="result"></pre>'
          f'<script>{TOOLS}{KEYS}{SEARCH.replace("WORDS", json.dumps(words))}{OTHERS}{checks}{RUN}</script>{inside}')


@pytest.fixture(scope='module')
def browse(chromium, tmp_path_factory):
  """A function: a page's HTML, or its address -> what it wrote into its `result`; with `pdf`, the bytes of its print."""
  place = tmp_path_factory.mktemp('browser')
  def browse(page, *flags, pdf=False, budget=8000):
    if not page.startswith('http:'):
      (place / 'page.html').write_text(page, encoding='utf-8')
      page = (place / 'page.html').as_uri()
    kind = [f'--print-to-pdf={place / "page.pdf"}', '--no-pdf-header-footer'] if pdf else ['--dump-dom']
    with (place / 'errors.txt').open('wb') as errors:
      done = subprocess.run(
        [chromium, '--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', f'--user-data-dir={place / "profile"}', '--window-size=1280,900',
         *([f'--virtual-time-budget={budget}'] if budget else []), *flags, *kind, page],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, timeout=60, check=True)
    if pdf:
      return (place / 'page.pdf').read_bytes()
    result = re.search(r'<pre id="result">(.+?)</pre>', done.stdout.decode(), re.S)
    assert result, 'the page did not come to its result'
    return json.loads(html.unescape(result[1]))

  return browse


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """The report of a small shop with hostile and long titles, as HTML."""
  place = tmp_path_factory.mktemp('chromium_shop')
  items = [{'title': title, 'category': f'Scientific > Antimicrobials > Transmissions {number}',
            'price': '' if number % 2 else '9.99'} for number, title in enumerate(TITLES)]
  write_shop(place, USERS, items, [IMAGE, SCRIPT, 'Rope'], [-0.5, -1.0, -2.0])
  evaluate(histories=histories_lib.load(place / 'data'), template=ItemTemplate(fields=('title',)), out=place / 'run',
           generations=place / 'generations')
  epochs = [{'loss': 3 / (1 + epoch), 'recall@10': 0.1 * epoch, 'mrr': 0.05 * epoch} for epoch in range(5)]
  write_lines(place / 'run/run.json', [{'command': ['calrec', 'evaluate', 'x' * 300, SCRIPT], 'versions': {'python': '3'},
                          'sasrec': {'epochs': epochs}, 'words': 'long ' * 60, 'generations': str(place / 'generations')}])
  (place / 'run/config.gin').write_text(f'# {IMAGE}\n' + 'x = 1  # a long line of a configuration ' * 9 + '\n')
  report([f'<b>run={place / "run"}'], place / 'page.html', data=place / 'data')
  return (place / 'page.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def people(page):
  """What the page knows of each user it shows."""
  return json.loads(re.search(r'id="examples-data">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope='module')
def light(browse, page):
  """What is found in each frame of the light page, and in those that have a flaw."""
  frames = {name: ('look', width, page) for name, width in SIZES.items()}
  frames |= {name: (name, 1280, page) for name in ('keys', 'search', 'plain')}
  frames |= {
    'print': ('print', PAPER, page), 'title': ('title', 1280, planted(page)),
    'wide': ('look', 390, planted(page, body='<div style="width:900px">wide</div>')),
    'pale': ('look', 390, planted(page, style='.note { color: #999; } small { font-size: 10px; }')),
    'mice': ('keys', 1280, planted(page, style=':focus-visible { outline: none; }', body=MICE)),
    'raw': ('title', 390, planted(page, body=f'<ul><li>{IMAGE}</li></ul>')),
    'raw_policy': ('title', 390, page.replace('</main>', f'{IMAGE}<script>document.title="owned"</script></main>', 1))}
  return browse(outer(frames, WORDS), '--blink-settings=preferredColorScheme=1')


@pytest.fixture(scope='module')
def dark(browse, page):
  frames = {name: ('look', width, page) for name, width in SIZES.items()} | {'print': ('print', PAPER, page)}
  frames['pale'] = ('look', 390, planted(page, style='.note { color: #555; }'))
  return browse(outer(frames, WORDS), '--blink-settings=preferredColorScheme=0')


# Ends its loading, and with it Chromium, when the frames are done: in real time, as virtual time need not paint.
WAIT = """<!DOCTYPE html><pre id="result"></pre><img src="/wait"><script>
const ask = () => {
  const found = [...document.querySelectorAll('iframe')].map((frame) => frame.contentWindow.found);
  if (!found.length || !found.every(Boolean)) return setTimeout(ask, 50);
  document.getElementById('result').textContent = JSON.stringify(found);
  fetch('/done');
};
ask();
</script>"""


@pytest.fixture(scope='module')
def alone(browse, page):
  """The page left alone, and with a flaw: what jumped and what was loaded within a second."""
  loads = planted(page, body='<img src="http://127.0.0.1:9/x.png" width="1" height="1">')
  frames = ''.join(f'<iframe style="width:1200px;height:400px" srcdoc="{html.escape(each)}"></iframe>'
                   for each in (first(page, WATCH), first(loads, WATCH + JUMP)))
  done = threading.Event()

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      if self.path == '/wait':
        done.wait(30)
      elif self.path == '/done':
        done.set()
      self.send_response(200)
      self.send_header('Content-Type', 'text/html; charset=utf-8')
      self.end_headers()
      self.wfile.write((WAIT + frames if self.path == '/' else '').encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      return browse(f'http://127.0.0.1:{server.server_port}/', budget=0)
    finally:
      done.set()
      server.shutdown()


def of(*findings):
  """(name, what was found) of each frame that looked at the report as it is."""
  return [(f'{scheme} {name}', found[name]) for scheme, found in findings for name in SIZES]


def test_the_frames_are_as_wide_and_as_dark_as_they_claim(light, dark):
  for scheme, found in (('light', light), ('dark', dark)):
    assert not [name for name, each in found.items() if 'error' in each]
    assert {name: found[name]['width'] for name in SIZES} == SIZES
    assert all(found[name]['dark'] == (scheme == 'dark') for name in SIZES)


def test_nothing_scrolls_sideways_but_boxes_that_the_keyboard_reaches(light):
  for name, found in of(('light', light)):
    assert found['scroll'] <= found['client'], name
    assert not found['unreachable'] and not found['hiding'], name
  assert light['phone']['scrolling'] > 1
  assert light['wide']['scroll'] >= 900 > light['wide']['client']


def test_text_is_large_enough(light):
  for name, found in of(('light', light)):
    assert found['texts'] > 500 and not found['small'], name
  assert '10.0 px' in light['pale']['small'][0]


def test_text_stands_out_in_light_and_in_dark(light, dark):
  for name, found in of(('light', light), ('dark', dark)):
    assert not found['faint'], name
  assert light['phone']['ground'] > 0.8 and dark['phone']['ground'] < 0.05
  assert light['pale']['faint'] and dark['pale']['faint']


def test_the_keyboard_reaches_all_and_shows_where_it_is(light):
  found, flawed = light['keys'], light['mice']
  assert set(found['seen']) == {'a', 'button', 'input', 'select', 'summary', 'div', 'pre'}
  assert found['clicks'] == ['button', 'button'] and found['skip']
  assert not found['mice'] and not found['positive'] and not found['refuse'] and not found['plain']
  assert flawed['mice'] == ['p#mouse.'] and flawed['positive'] == ['b#.'] and len(flawed['plain']) > 20


def test_a_button_keeps_the_focus_at_the_last_page(light):
  found = light['keys']
  assert found['last']['shown'] == found['beyond'] == len(USERS) - 10
  assert found['last']['kept'] and 'dashed' in found['last']['style']


def test_the_search_leaves_what_holds_its_words(light, people):
  found = light['search']
  assert found['all'] == [one['user'] for one in people] and sorted(found['all']) == sorted(USERS)
  holds = lambda one, text: all(word in json.dumps(one).lower() for word in text.lower().split())
  for text, (shown, told) in found['searches'].items():
    assert shown == [one['user'] for one in people if holds(one, text)], text
    assert told == (f'1 to {len(shown)} of the {len(shown)} users that fit (of {len(people)})' if shown else
                    'No user fits; clear the search or a filter.')
  assert list(found['searches']) == WORDS
  assert [len(found['searches'][text][0]) for text in (WORDS[0], WORDS[-1])] == [1, 0]


def test_each_filter_leaves_its_users(light, people):
  found = light['search']
  want = {'hit ': lambda one: True, 'target ': lambda one: True, 'target cold': lambda one: one['cold'],
          'target warm': lambda one: not one['cold'], 'target repeat': lambda one: one['repeat'],
          'target new': lambda one: not one['repeat']}
  for number in range(len(people[0]['methods'])):
    want[f'hit y{number}'] = lambda one, number=number: one['methods'][number]['hit']
    want[f'hit n{number}'] = lambda one, number=number: not one['methods'][number]['hit']
  assert found['filters'] == {name: [one['user'] for one in people if fits(one)] for name, fits in want.items()}
  assert found['filters']['target cold'] == ['shopper-of-the-new']
  assert found['both'] == [one['user'] for one in people if one['repeat'] and 'shopper-1' in one['user']]


def test_pages_turn_and_without_script_all_is_there(light, people):
  found = light['search']
  assert found['first'] == found['back'] and len(found['first']) == 10
  assert found['first'] + found['second'] == [one['user'] for one in people]
  assert found['first_told'] == f'1 to 10 of the {len(people)} users that fit (of {len(people)})'
  assert light['plain'] == {'examples': len(people), 'controls': 0}


def test_nothing_jumps(alone, light):
  found, flawed = alone
  assert found['shifts'] == []
  assert sum(value for value, *_ in flawed['shifts']) > 0.01
  assert not light['phone']['unsized']
  assert light['search']['wide'] == light['search']['wide_when_short'] < 1280  # a scroll bar that comes moves nothing


def test_nothing_is_loaded(alone, page):
  found, flawed = alone
  assert found['loaded'] == [] and flawed['loaded'] == ['http://127.0.0.1:9/x.png']

  class Addresses(html.parser.HTMLParser):
    found = []

    def handle_starttag(self, tag, attrs):
      self.found += [(tag, key, value) for key, value in attrs
                     if key in ('src', 'srcset', 'action', 'data', 'poster', 'background', 'ping', 'xlink:href')
                     or (key == 'href' and not value.startswith('#')) or tag in ('link', 'iframe', 'base', 'object', 'embed')]

  Addresses().feed(page)
  assert Addresses.found == []
  assert 'url(' not in page and '@import' not in page
  assert not re.search(r'\b(fetch|import|XMLHttpRequest|sendBeacon)\b *\(', page)


def test_titles_are_text_even_without_the_policy(light, alone):
  found = light['title']
  assert found['title'] == alone[0]['title'] == TITLE and found['images'] == 0
  assert found['scripts'] == 3  # the page's two, and `LISTEN`
  for text in (IMAGE, SCRIPT):
    assert any(item.startswith(text) for item in found['items'])
  assert light['raw']['title'] == 'owned'  # so an unescaped title would have been seen
  assert light['raw_policy']['title'] == TITLE  # and the policy would have kept it from running


def test_it_prints(browse, page, light, dark):
  content = browse(page, pdf=True)
  assert content.startswith(b'%PDF') and 1 <= len(re.findall(rb'/Type\s*/Page\b', content)) < 40
  for found in (light['print'], dark['print']):
    assert found['controls'] == [] and found['examples'] == 10
    assert found['scroll'] <= found['client'] and found['scrolling'] == 0
    assert not found['faint'] and not found['small'] and found['ground'] > 0.8
