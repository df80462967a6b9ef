"""The method's 13 categories."""

import re

from calrec_jax.tasks.categories import CATEGORIES, SOURCES, TARGETS, prepare_command


def test_six_targets_and_seven_sources():
  assert (len(TARGETS), len(SOURCES), len(CATEGORIES)) == (6, 7, 13)


def test_a_task_is_named_as_the_dump_in_small_letters():
  assert all(dump.lower() == name and re.fullmatch(r'\w+', name) for name, dump in CATEGORIES.items())


def test_the_command_that_prepares_a_category_names_the_dumps():
  assert prepare_command('video_games', 'data/video_games') == (
      'calrec prepare dumps --reviews Video_Games_5.json.gz --meta meta_Video_Games.json.gz --name video_games '
      '--out data/video_games')
  assert prepare_command('mine', 'data/mine').startswith('calrec prepare histories ')
