"""Texts of real dumps come out as one line of plain text; cleaning twice changes nothing."""

import json
import re
import time

import hypothesis
import pytest
from hypothesis import strategies

from calrec_jax.data import cleaning, json_lines

CSS = ('.a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{background-color:#fffbf3;border-color:#e77600;'
       'box-shadow:0 0 3px rgba(228,121,17,.5)}')
SCRIPT = 'var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();'


@pytest.mark.parametrize('dirty, clean', [
    (None, ''), ('', ''), (True, ''), (['x'], ''), (3, '3'),
    (' a\t b\r\n c\u00a0d ', 'a b c d'),
    ('Max &amp; Erma&#39;s Caf&eacute;', "Max & Erma's Café"),
    ('Disney &amp;amp; Me &amp;quot;x&amp;quot;', 'Disney & Me "x"'),
    ('&#x41;&#66; &#0; &unknown; AT&T Cats&notes', 'AB \ufffd &unknown; AT&T Cats&notes'),
    ('a\u200bb\u202ec\x07d\ud800e', 'abcde'),
    ('&am\u200bp;', '&'),
    ('<b>stays</b>', '<b>stays</b>'),
])
def test_plain_text(dirty, clean):
  assert cleaning.plain_text(dirty) == clean


@pytest.mark.parametrize('dirty, clean', [
    ('<span class="a-size-medium a-color-secondary"', ''),
    (' Magazines" />', ''),
    ('\n\n\n<a', ''),
    ('</span></span></span>', ''),
    ('<span id="productTitle" class="a-size-large">\n  Wired\n</span>', 'Wired'),
    ('Wired <span class="x"', 'Wired'),
    ('&lt;b&gt;Wired&lt;/b&gt; &amp;lt;i&amp;gt;USA', 'Wired USA'),
    ('One<br>Two<br/>Three', 'One Two Three'),
    ('Wired<script type="text/javascript">P.when("a").execute(function(a){});</script> USA', 'Wired USA'),
    ('Wired <!-- a > b --> USA', 'Wired USA'),
    ('<style>.a{color:red}', ''),
    (SCRIPT, ''), (CSS, ''),
    # What looks a little like markup, and is none.
    *[(text, text) for text in (
        'I <3 U', 'sizes < 5 and > 3', 'Clearner >>> THT Trading', '<Untitled> by <Anon>', 'less <b', 'Function (Band)',
        'Entertainment Weekly {The Walking Dead Exclusive}', 'Variables = Fun', 'Sticks to window.Great')],
])
def test_clean_text(dirty, clean):
  assert cleaning.clean_text(dirty) == clean


@pytest.mark.parametrize('dirty, clean', [
    ('by\n    \n    Apple', 'Apple'), ('by Design', 'by Design'), ('F&amp;W (Magazines)', 'F&W (Magazines)'),
])
def test_clean_brand(dirty, clean):
  assert cleaning.clean_brand(dirty) == clean


@pytest.mark.parametrize('price', ['$12.99', '$1,299.00 - $1,499.00', '$25.00', '£5', '12.99', 'CDN$ 4.50', '$1299.00'])
def test_a_price_stays_as_it_is_written(price):
  assert cleaning.clean_price(f' {price}\n') == price


@pytest.mark.parametrize('price', [
    '', None, CSS, SCRIPT, '\n\n\n<a', 'from $5', '$', 'free', '$1.2.3', '$5 $6', True, 0, -1.5, float('nan'),
    float('inf'), ['$5'], '\n\t\t    \r\n   <div class="a-section a-spacing-none"'])
def test_what_is_no_price_is_unknown(price):
  assert cleaning.clean_price(price) == ''


def test_a_number_is_a_price_in_dollars():
  assert (cleaning.clean_price(7), cleaning.clean_price(12.5)) == ('$7.00', '$12.50')


@pytest.mark.parametrize('levels, clean', [
    (['Gift Cards', 'Gift Cards'], 'Gift Cards'),
    (['A &amp; B', ' C\n', 'A & B', 'D'], 'A & B, C, D'),
    (['Gift Cards', 'Gift Cards', '</span></span></span>', 'Starbucks Gift Card 25', 'Starbucks'], 'Gift Cards'),
    (['Gift Cards', 'No expiration, no fees.', 'Variety of designs'], 'Gift Cards'),
    ([['Movies', 'TV'], ['Books']], 'Movies, TV'),
    ('Toys', 'Toys'), ([], ''), (None, ''), ([None, 'x'], ''),
])
def test_clean_category(levels, clean):
  assert cleaning.clean_category(levels) == clean


def test_joined_levels_keep_what_the_user_wrote():
  assert cleaning.joined_levels(['A &amp; B', None, 'A & B', ' No fees. ']) == 'A & B, A & B, No fees.'
  assert cleaning.joined_levels('Toys > Games') == 'Toys > Games'


@hypothesis.given(strategies.lists(strategies.sampled_from(
    ['&', 'amp;', 'lt;', 'gt;', '#39;', '<', '>', 'b', 'span', ' ', '\n', '"', '/>', '=', '\u200b', '<script', '-->',
     '{', 'a:b', '}'])).map(''.join))
def test_cleaning_ends_and_a_second_time_changes_nothing(text):
  for clean in (cleaning.plain_text, cleaning.clean_text):
    once = clean(text)
    assert clean(once) == once
    assert cleaning.plain_text(once) == once
    assert once == ' '.join(once.split())


def test_real_metadata_lose_no_prose_and_keep_no_rubbish(real_data):
  rubbish = re.compile(r'</?span|</?div|class=|&amp;|&#\d|\{|getTime|\s{2}|[\r\n\t]')
  n_unfinished = n_titles = 0
  for name in ('Gift_Cards', 'Magazine_Subscriptions'):
    path = real_data / f'amazon2018_raw/meta_{name}.json.gz'
    for _, row in json_lines.objects(path, json_lines.BadLines(path, 0)):
      fields = [cleaning.clean_text(row['title']), cleaning.clean_category(row['category']),
                cleaning.clean_brand(row['brand']), cleaning.clean_price(row['price'])]
      assert not [text for text in fields if rubbish.search(text.replace('{The Walking Dead Exclusive}', '')
                                                             .replace('{the Country Issue}', ''))], json.dumps(row)
      if not re.search(r'[<>{}&]', row['title']):
        assert fields[0] == ' '.join(row['title'].split())
      n_unfinished += row['title'].startswith('<span') and not fields[0]
      n_titles += bool(fields[0])
  assert n_unfinished > 1000 and n_titles > 1500


@pytest.mark.parametrize('piece', ['<a ', '=', '&amp;', 'amp;', '<', '" ', '<script ', '<!--', '$1,', '{a-', 'word <b>x</b> ',
                                   '<a b=', '"/>', '<a b=x '])
def test_long_and_hostile_titles_take_no_time(piece):
  began = time.monotonic()
  for text in (piece * (100_000 // len(piece)), f'<a &{piece * (100_000 // len(piece))}<'):
    for clean in (cleaning.clean_text, cleaning.clean_price, cleaning.clean_brand):
      clean(text)
  assert time.monotonic() - began < 10  # a loaded machine; in the square of the length it took minutes


def one_at_a_time(value):
  """`clean_text` without a script's or a page's words, taking one unfinished tag, or one rest of a tag, at a time."""
  names = cleaning._TAG_NAMES
  unfinished = re.compile(rf'(?:^\s*</?(?:{names})(?:\s[^<>]*)?|<(?:{names})\s[^<>=]*=[^<>]*)$', re.IGNORECASE)
  rest = re.compile(r'^[^<>]*["\']\s*/>')
  text, before = cleaning.plain_text(value), None
  while text != before:
    before = text
    for pattern in (cleaning._BLOCK, cleaning._COMMENT, cleaning._TAG, rest, unfinished):
      text = pattern.sub(' ', text)
    text = cleaning.plain_text(text)
  return text


@hypothesis.given(strategies.lists(strategies.sampled_from(
    ['<a b=', '<b', '</b', '<a', '"/>', "' />", '>', '<', 'x', ' ', '"', '=', '<i>', '<q c="d"', '&lt;', '<!--', '\n', '/'])))
@hypothesis.settings(max_examples=500)
def test_all_unfinished_tags_at_once_are_one_at_a_time(parts):
  assert cleaning.clean_text(''.join(parts)) == one_at_a_time(''.join(parts))
