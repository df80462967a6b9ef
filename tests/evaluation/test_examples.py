"""The examples show what was bought, written, ranked and true, of users drawn without a look at their results."""

import pytest

from calrec_jax.evaluation.examples import examples, printable
from calrec_jax.evaluation.generations import Generation
from calrec_jax.ranking import catalogue
from calrec_jax.text.templates import ItemTemplate

TEXTS_OF = {user: Generation(['Title: Rope\x1b[2J.\n', 'Title: Steel Hose.', ''], [-2.0, -0.5, -9.0])
            for user in ('ann', 'bob', 'cat')}


@pytest.fixture
def show(shop):
  lines = [{'user_id': user, 'target': target, 'better': better, 'tied': tied,
            'top': [{'item_id': 'h2', 'score': 1.0}, {'item_id': 'g1', 'score': 0.25}]}
           for user, target, better, tied in (('ann', 'h2', 0, 0), ('bob', 'h1', 2, 3), ('cat', 't2', 5, 0))]
  written = catalogue.from_histories(shop, ItemTemplate())
  return lambda lines=lines, **options: examples(shop, written, TEXTS_OF, lines, **{'split': 'test', **options})


def test_one_user_in_full(show):
  ann = next(block for block in show().split('\n\n') if block.startswith('User ann'))
  assert ann.splitlines() == [
    'User ann',
    '  history (3 items, oldest first)',
    '    Strong Glue',
    '    Garden Hose',
    '    Strong Glue',
    '  generated texts (3 of 3, with their probability)',
    '        0.61  Title: Steel Hose.',
    '        0.14  Title: Rope\ufffd[2J.',
    '     0.00012  (empty)',
    '  top 2 items (score)',
    '      1.0000  Steel Hose',
    '      0.2500  Strong Glue',
    '  truth (rank 1 of 6)',
    '    Steel Hose',
  ]


def test_long_lists_are_cut_and_ties_told(show):
  text = show(n_items=2, n_texts=1)
  assert '... 1 earlier' in text and 'generated texts (1 of 3' in text
  assert 'truth (rank 3 to 6, tied, of 6)' in text


def test_the_context_of_validation_is_shorter(show):
  assert 'history (2 items' in show(split='validation')


def test_the_draw_does_not_depend_on_results_or_order(show, shop):
  users = [line.split()[1] for line in show(n_users=2).splitlines() if line.startswith('User ')]
  assert len(users) == 2
  better = [{'user_id': user, 'target': 'g1', 'better': 0, 'tied': 0, 'top': []} for user in ('cat', 'bob', 'ann')]
  assert [line.split()[1] for line in show(better, n_users=2).splitlines() if line.startswith('User ')] == users
  assert show(n_users=0) == ''


def test_an_item_without_a_title_is_called_by_its_text(shop):
  shop.items[0]['title'] = ''
  written = catalogue.from_histories(shop, ItemTemplate())
  line = {'user_id': 'ann', 'target': 'g1', 'better': 0, 'tied': 0, 'top': []}
  shown = examples(shop, written, TEXTS_OF, [line], split='test')
  assert 'Title: Unknown. Category: Unknown.' in shown


def test_text_that_would_steer_a_terminal():
  assert printable(' a\t\x07b\r\n c\u202e ') == 'a \ufffdb c\ufffd'
