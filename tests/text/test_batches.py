"""The plan of batches: a function of (data, seed, step), nothing lost, rates kept, rows full."""

import collections

import numpy as np
import pytest
from toy_corpus import random_corpus, toy_corpus, toy_source, toy_vocabulary

from calrec_jax.data import histories
from calrec_jax.errors import UserError
from calrec_jax.text import batches as batches_lib
from calrec_jax.text.batches import BatchPlan, OnePass, RowOptions, Stream
from calrec_jax.text.corpus import Source, build_corpus, excerpts
from calrec_jax.text.item_tokens import item_tokens
from calrec_jax.text.rows import target_texts
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

WINDOW = 4  # steps


def plan(corpus=None, *, seed=3, targets='all', batch_size=3, **options) -> BatchPlan:
  corpus = random_corpus(0, users=60) if corpus is None else corpus
  return BatchPlan(corpus, batch_size=batch_size, length=48, seed=seed,
                   options=RowOptions(targets=targets, context_items=2, window_steps=WINDOW, **options))


def check_function_of_step(make_plan):
  """Batches do not depend on what was asked before, on the object, or on which rows are built."""
  in_order = make_plan()
  steps = [0, 1, 2, 5, 9, 13]
  batches = {step: in_order.batch(step) for step in steps}
  fresh = make_plan()
  for step in [13, 2, 0, 9, 1, 5]:
    for name, array in fresh.batch(step).items():
      np.testing.assert_array_equal(array, batches[step][name], err_msg=f'{name} of step {step}')
    for rows in (slice(0, 1), slice(1, 3)):
      for name, array in fresh.batch(step, rows).items():
        np.testing.assert_array_equal(array, batches[step][name][rows], err_msg=f'{name} of {rows} of step {step}')


@pytest.mark.parametrize('targets', ['last', 'all'])
def test_a_batch_is_a_function_of_data_seed_and_step(targets):
  check_function_of_step(lambda: plan(targets=targets))


class _OneGenerator(BatchPlan):
  """A mutant: the next window's rows depend on how many windows were dealt before."""

  def _deal(self, rows, B, rng):
    self.__dict__.setdefault('rng', np.random.default_rng(0))
    return super()._deal(rows, B, self.rng)


def test_a_plan_with_a_memory_fails():
  options, corpus = RowOptions(window_steps=WINDOW), random_corpus(0, users=60)
  with pytest.raises(AssertionError):
    check_function_of_step(lambda: _OneGenerator(corpus, batch_size=3, length=48, options=options, seed=3))


def test_another_seed_gives_other_batches():
  assert plan(seed=3).example_ids(0) != plan(seed=4).example_ids(0)


def held(a_plan, steps) -> list[int]:
  return [int(e) for step in steps for row in a_plan.layout(step).rows for e in row]


def check_every_excerpt_once_an_epoch(a_plan, windows):
  """The windows are a stream that holds each excerpt equally often, up to one; and nothing is dropped."""
  seen = collections.Counter()
  for window in range(windows):
    assert a_plan._window(window)[1] == 0
    seen.update(held(a_plan, range(window * WINDOW, (window + 1) * WINDOW)))
    counts = [seen[e] for e in range(len(a_plan.excerpts))]
    assert max(counts) - min(counts) <= 1
  assert min(counts) >= 2  # several epochs


@pytest.mark.parametrize('targets', ['last', 'all'])
def test_every_excerpt_once_an_epoch(targets):
  check_every_excerpt_once_an_epoch(plan(random_corpus(1, users=70), targets=targets), 10)


def test_drawing_with_replacement_fails(monkeypatch):
  a_plan = plan(random_corpus(1, users=70))
  draw, n = a_plan._draw, len(a_plan.excerpts)
  monkeypatch.setattr(a_plan, '_draw', lambda w: np.random.default_rng(w).choice(n, len(draw(w)) - 3))
  a_plan._window.cache_clear()
  with pytest.raises(AssertionError):
    check_every_excerpt_once_an_epoch(a_plan, 10)


@pytest.mark.parametrize('pieces', [[7, 50, 3, 1, 200, 90], [1000], [11] * 40])
def test_a_stream_is_one_permutation_after_the_other(pieces):
  corpus = random_corpus(2, users=15)
  cut = excerpts(corpus, length=48, targets='last', context_items=0)
  members = np.arange(2, 12)
  stream = Stream(cut, members, (5, 0))
  ends = np.cumsum([0, *pieces])
  taken = np.concatenate([stream.take(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]).tolist()
  tokens = np.cumsum(cut.tokens[taken])
  assert tokens[-1] <= ends[-1] < tokens[-1] + cut.tokens.max()
  for epoch in range(len(taken) // 10):
    assert sorted(taken[epoch * 10:epoch * 10 + 10]) == members.tolist()
  assert len(taken) < 20 or taken[:10] != taken[10:20]


def two_sources(rates):
  """A source of short histories and one of long ones."""
  rng = np.random.default_rng(0)
  items = [[10 + n] * 2 for n in range(12)]
  draw = lambda low, high, n: [rng.integers(0, 12, rng.integers(low, high)).tolist() for _ in range(n)]
  sources = [toy_source(items, draw(2, 4, 40), name='short', rate=rates[0]),
             toy_source(items, draw(5, 9, 15), name='long', rate=rates[1])]
  return build_corpus(sources, template=ItemTemplate(), vocabulary=toy_vocabulary(), split='test', max_item_tokens=9)


def check_rates(a_plan, rates):
  ids = [user for step in range(20 * WINDOW) for user in a_plan.example_ids(step)]
  share = sum(user.startswith('short') for user in ids) / len(ids)
  np.testing.assert_allclose(share, rates[0] / sum(rates), atol=0.01)


@pytest.mark.parametrize('rates', [(1, 1), (3, 1), (0.2, 0.6)])
def test_a_mixture_follows_its_rates(rates):
  check_rates(plan(two_sources(rates)), rates)


def test_rates_of_tokens_instead_of_examples_fail():
  a_plan = plan(two_sources((1, 1)))
  a_plan.token_shares = np.array([0.5, 0.5])
  a_plan._window.cache_clear()
  with pytest.raises(AssertionError):
    check_rates(a_plan, (1, 1))


def test_a_source_of_rate_zero_gives_nothing():
  check_rates(plan(two_sources((0, 1))), (0, 1))


def check_alone_parts(a_plan, steps):
  """Texts are distinct in a step; each is some span's; each span's slot holds its text."""
  for step in steps:
    batch, layout = a_plan.batch(step), a_plan.layout(step)
    texts, used = batch['slot_texts'][batch['slot_texts'] > 0], batch['span_texts'] > 0
    assert len(set(texts.tolist())) == len(texts)
    np.testing.assert_array_equal(np.sort(texts), np.unique(batch['span_texts'][used]))
    np.testing.assert_array_equal(batch['slot_texts'].reshape(-1)[batch['span_slots']][used], batch['span_texts'][used])
    chosen = np.concatenate(layout.rows).astype(np.int64)
    np.testing.assert_array_equal(batch['span_texts'][used], target_texts(a_plan.corpus, a_plan.excerpts, chosen))
    assert batch['loss_weights'].sum() == a_plan.excerpts.losses[chosen].sum()


@pytest.mark.parametrize('targets', ['last', 'all'])
def test_each_text_is_encoded_once_a_step(targets):
  check_alone_parts(plan(targets=targets), range(3 * WINDOW))


def test_texts_twice_in_a_step_fail(monkeypatch):
  monkeypatch.setattr(batches_lib, '_distinct_texts', lambda corpus, cut, rows: target_texts(
      corpus, cut, np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64)))
  with pytest.raises(AssertionError):
    check_alone_parts(plan(), range(WINDOW))


def test_given_sizes_are_kept():
  a_plan = plan(alone_length=40, spans_per_row=11, alone_slots=9)
  shapes = a_plan.shapes
  assert (shapes.B, shapes.L, shapes.M, shapes.E, shapes.S) == (3, 48, 40, 11, 9)
  assert {name: (a.shape, a.dtype.type) for name, a in a_plan.batch(1).items()} == shapes.features()
  check_alone_parts(a_plan, range(WINDOW))


@pytest.mark.parametrize('targets', ['last', 'all'])
def test_longer_rows_hold_the_same_excerpts_and_are_fuller(targets):
  corpus = random_corpus(0, users=300, lengths=(4, 9))
  short, long = plan(corpus, targets=targets, batch_size=4), plan(corpus, targets=targets, batch_size=2, row_length=96)
  assert long.shapes.L == 96 and long.shapes.E >= short.shapes.E
  np.testing.assert_array_equal(long.excerpts.tokens, short.excerpts.tokens)
  check_alone_parts(long, range(WINDOW))
  assert long.report['joint_fill'] > short.report['joint_fill'] + 0.05


def test_what_does_not_fit_is_left_out_counted_and_said(caplog):
  a_plan = plan(alone_length=8)
  check_alone_parts(a_plan, range(WINDOW))
  dropped = a_plan.report['dropped_in_first_window']
  assert dropped == len(a_plan._draw(0)) - len(held(a_plan, range(WINDOW))) > 0
  assert f'{dropped} of {len(a_plan._draw(0))} histories of window 0' in caplog.text


def test_the_report_counts():
  corpus = toy_corpus([[7, 8], [9], [5, 6]], [[0, 1, 2], [0], [2, 1]], max_item_tokens=1)
  report = plan(corpus).report
  assert report | {'excerpts': 2, 'targets': 3, 'histories': 3, 'histories_without_target': 1, 'items_cut': 2,
                   'item_tokens_cut': 2, 'dropped_in_first_window': 0} == report
  a_plan = plan()
  joint = np.mean([(a_plan.batch(step)['segments'] > 0).mean() for step in range(WINDOW)])
  alone = np.mean([(a_plan.batch(step)['alone_segments'] > 0).mean() for step in range(WINDOW)])
  np.testing.assert_allclose([a_plan.report['joint_fill'], a_plan.report['alone_fill']], [joint, alone])


def test_bad_options():
  with pytest.raises(UserError, match="rows.targets = 'some'"):
    RowOptions(targets='some')
  with pytest.raises(UserError, match='no training target'):
    plan(toy_corpus([[7]], [[0], []]))
  for option in ('alone_length', 'spans_per_row', 'row_length'):
    with pytest.raises(UserError, match=f'rows.{option} = 4'):
      plan(**{option: 4})


def test_what_no_probe_saw_fits_all_the_same():
  items = [[10], [11] * 9, [12, 13]]
  corpus = toy_corpus(items, [[2, 2]] * 400 + [[0] * 23, [2, 1]])
  for seed in range(3):
    a_plan = plan(corpus, seed=seed, batch_size=1)
    probed = {e for window in range(batches_lib.PROBES) for e in a_plan._draw(window).tolist()}
    windows = range(len(corpus.offsets) * 7 // a_plan.window_tokens + 2)
    seen = {e for window in windows for e in held(a_plan, range(window * WINDOW, (window + 1) * WINDOW))}
    assert {400, 401} <= seen and not {400, 401} <= probed


def check_one_pass(one_pass, expected):
  chosen = [int(e) for layout in one_pass.layouts for row in layout.rows for e in row]
  assert sorted(chosen) == list(expected)
  batches = [one_pass.batch(step) for step in range(len(one_pass))]
  for batch in batches:
    assert {name: (a.shape, a.dtype.type) for name, a in batch.items()} == one_pass.shapes.features()
    used = batch['span_texts'] > 0
    np.testing.assert_array_equal(batch['slot_texts'].reshape(-1)[batch['span_slots']][used], batch['span_texts'][used])
  cut = one_pass.excerpts
  assert sum(int((b['span_texts'] > 0).sum()) for b in batches) == (cut.stops - cut.first_targets)[chosen].sum()
  assert sum(b['loss_weights'].sum() for b in batches) == cut.losses[chosen].sum()


@pytest.mark.parametrize('targets', ['last', 'all'])
def test_one_pass_holds_every_excerpt_once(targets):
  corpus = random_corpus(4, users=40)
  one_pass = OnePass(corpus, batch_size=3, length=48, options=RowOptions(targets=targets, context_items=1))
  check_one_pass(one_pass, range(len(one_pass.excerpts)))
  one_pass.layouts.append(one_pass.layouts[0])
  with pytest.raises(AssertionError):
    check_one_pass(one_pass, range(len(one_pass.excerpts)))


@pytest.mark.parametrize('targets', ['last', 'all'])
def test_one_pass_knows_what_was_bought_before(targets):
  corpus = random_corpus(4, users=40)
  one_pass = OnePass(corpus, batch_size=3, length=48, options=RowOptions(targets=targets, context_items=1))
  others, repeats = one_pass.seen
  spans = [(int(one_pass.excerpts.users[e]), place) for layout in one_pass.layouts for row in layout.rows for e in row.tolist()
           for place in range(one_pass.excerpts.first_targets[e], one_pass.excerpts.stops[e])]
  assert len(others) == len(repeats) == len(spans) == len(one_pass.targets)
  for (user, place), texts, repeat, text in zip(spans, others, repeats.tolist(), one_pass.targets.tolist(), strict=True):
    before, target = corpus.events[corpus.offsets[user]:place].tolist(), int(corpus.events[place])
    assert corpus.text_ids[target] == text and repeat == (target in before)
    assert sorted(texts.tolist()) == sorted(corpus.text_ids[item] for item in set(before) - {target})
  assert repeats.any() and not repeats.all()


def test_one_pass_of_a_few_histories_spreads_them_evenly():
  options = RowOptions(targets='last')
  one_pass = OnePass(random_corpus(4, users=40), batch_size=4, length=48, options=options, max_histories=7)
  check_one_pass(one_pass, [0, 5, 11, 17, 22, 28, 34])


def test_one_pass_over_nothing():
  one_pass = OnePass(toy_corpus([[7]], [[0]]), batch_size=2, length=16, options=RowOptions())
  assert len(one_pass) == 0 and one_pass.report == {}


def test_rows_are_full_on_real_data(real_data):
  folder = real_data / 'histories/scientific2018'
  data, template = histories.load(folder), ItemTemplate()
  texts = [template.item_text(item) for item in data.items]
  vocabulary = train_vocabulary([' ' + text for text in texts], size=4096, phrases=template_phrases(template))
  corpus = build_corpus([Source(data, item_tokens(texts, vocabulary))], template=template, vocabulary=vocabulary,
                        split='train', max_item_tokens=64)
  for targets in ('last', 'all'):
    a_plan = BatchPlan(corpus, batch_size=16, length=512, options=RowOptions(targets=targets), seed=0)
    assert a_plan.report['joint_fill'] >= 0.96
    later = [(a_plan.batch(step)['segments'] > 0).mean() for step in range(64 * 3, 64 * 4)]
    assert np.mean(later) >= 0.96 and a_plan._window(3)[1] == 0
