"""Law 5 with kill -9: see `kills.py`, which does it ten times."""

import kills
import pytest


@pytest.mark.slow
def test_killed_twice_once_inside_a_checkpoint_it_is_the_run_that_never_was(tiny_store, tmp_path):
  alone = kills.live(tiny_store, tmp_path / 'whole', kills.STEPS)
  assert alone.steps == list(range(kills.STEPS)) and not alone.killed
  lives = kills.run(tiny_store, tmp_path / 'killed', kills=2, inside=1, seed=3, seconds=1.0)
  assert [life.killed for life in lives] == [True, True, False]
  assert sum(bool(life.half_written) for life in lives) >= 1 and not lives[-1].half_written
  assert any(later.steps[0] > 0 for later in lives[1:])  # something was gone on from
  assert kills.compare(tmp_path / 'killed', tmp_path / 'whole') == []
