"""The losses against brute force in numpy: InfoNCE, its masks and directions, token losses, weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.errors import UserError
from calrec_jax.models import losses
from calrec_jax.models.losses import Objective, info_nce, unit, weighted_mean

E, D = 7, 5
TEXTS = np.array([4, 9, 4, 2, 0, 8, 0])  # 4 twice, two empty slots
HISTORIES = np.array([1, 1, 2, 2, 0, 3, 0])
USED = TEXTS > 0
LOG_SHARES = np.log([0.1, 0.6, 0.1, 0.2, 1, 0.1, 1]).astype(np.float32)
OBJECTIVES = [Objective(), Objective(direction='target_to_context'), Objective(direction='symmetric', temperature=0.1),
              Objective(mask_same_text=False), Objective(mask_same_history=True), Objective(temperature=2.0),
              Objective(sampling_correction=1.0, direction='symmetric'), Objective(sampling_correction=0.3)]


def vectors(seed=0, n=E):
  return np.random.default_rng(seed).normal(size=(2, n, D)).astype(np.float32)


def brute_force(context_ED, target_ED, text_E, history_E, objective):
  """InfoNCE in float64, one span after the other."""
  c, t = (x.astype(np.float64) for x in (context_ED, target_ED))
  c, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (c, t))

  log_shares_E = LOG_SHARES.astype(np.float64) * objective.sampling_correction

  def one(anchor, others, e, off):
    total = 0.0
    for f in range(len(text_E)):
      same_text = objective.mask_same_text and text_E[f] == text_E[e]
      same_history = objective.mask_same_history and history_E[f] == history_E[e]
      if f == e or (text_E[f] > 0 and not same_text and not same_history):
        total += np.exp(anchor[e] @ others[f] / objective.temperature - off[f])
    return np.log(total) - anchor[e] @ others[e] / objective.temperature + off[e]

  to_target = [one(c, t, e, log_shares_E) if text_E[e] else 0.0 for e in range(len(text_E))]
  to_context = [one(t, c, e, np.zeros(E)) if text_E[e] else 0.0 for e in range(len(text_E))]
  return {'context_to_target': np.array(to_target), 'target_to_context': np.array(to_context),
          'symmetric': (np.array(to_target) + np.array(to_context)) / 2}[objective.direction]


def check_formula(loss, objective):
  for seed in range(3):
    context_ED, target_ED = vectors(seed)
    np.testing.assert_allclose(loss(context_ED, target_ED, TEXTS, HISTORIES, LOG_SHARES, objective=objective),
                               brute_force(context_ED, target_ED, TEXTS, HISTORIES, objective), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_info_nce_is_the_formula(objective):
  check_formula(info_nce, objective)


MUTANTS = {
    'no mask': dict(mask_same_text=False), 'histories masked': dict(mask_same_history=True),
    'transposed': dict(direction='target_to_context'), 'temperature': dict(temperature=0.25),
    'corrected': dict(sampling_correction=1.0)}


@pytest.mark.parametrize('mutant', MUTANTS)
def test_mutants_of_the_formula_fail(mutant):
  changed = dataclasses.replace(Objective(), **MUTANTS[mutant])
  with pytest.raises(AssertionError):
    check_formula(lambda *args, objective: info_nce(*args, objective=changed), Objective())


def test_dot_products_instead_of_cosines_fail(monkeypatch):
  monkeypatch.setattr(losses, 'unit', lambda x: x)
  with pytest.raises(AssertionError):
    check_formula(info_nce, Objective())


@pytest.mark.parametrize('direction', losses.DIRECTIONS)
@pytest.mark.parametrize('n', [1, 2, 8])
def test_equal_vectors_cost_the_log_of_their_number(direction, n):
  unit_ED = jnp.full((n, 4), 0.5)
  nll_E = info_nce(unit_ED, unit_ED, jnp.arange(1, n + 1), jnp.arange(n), objective=Objective(direction=direction))
  np.testing.assert_allclose(nll_E, np.full(n, np.log(n)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_permuting_spans_permutes_the_loss(objective):
  arrays, order = (*vectors(), TEXTS, HISTORIES, LOG_SHARES), np.random.default_rng(1).permutation(E)
  loss = lambda order: info_nce(*(array[order] for array in arrays), objective=objective)
  np.testing.assert_allclose(loss(order), loss(np.arange(E))[order], rtol=1e-5, atol=1e-6)


def check_twin_gets_no_gradient(objective):
  context_ED, target_ED = vectors(n=4)
  text_E, history_E = jnp.array([7, 5, 7, 2]), jnp.arange(4)
  first_nll = lambda target_ED: info_nce(context_ED, target_ED, text_E, history_E, objective=objective)[0]
  grad_ED = jax.grad(first_nll)(target_ED)
  np.testing.assert_array_equal(grad_ED[2], 0)
  assert np.abs(grad_ED[1]).max() > 1e-3


def test_a_repeated_text_sends_no_gradient_to_its_twin():
  check_twin_gets_no_gradient(Objective())
  with pytest.raises(AssertionError):
    check_twin_gets_no_gradient(Objective(mask_same_text=False))


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_empty_slots_cost_nothing_and_change_nothing(objective):
  context_ED, target_ED = vectors()
  total = lambda c, t, *spans: info_nce(c, t, *spans, objective=objective)
  spans = TEXTS, HISTORIES, LOG_SHARES
  nll_E = total(context_ED, target_ED, *spans)
  np.testing.assert_array_equal(nll_E[~USED], 0)
  np.testing.assert_allclose(
      nll_E[USED], total(context_ED[USED], target_ED[USED], *(x[USED] for x in spans)), rtol=1e-5)
  grads = jax.grad(lambda c, t: total(c, t, *spans).sum(), argnums=(0, 1))(context_ED, target_ED)
  for grad_ED in grads:
    assert np.isfinite(grad_ED).all() and np.abs(grad_ED[USED]).max() > 1e-3
    np.testing.assert_allclose(grad_ED[~USED], 0, atol=1e-7)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_zero_vectors_have_finite_gradients(objective):
  context_ED, target_ED = vectors()
  context_ED[[1, 4]], target_ED[[3, 4]] = 0, 0  # slot 4 is empty, the others are not
  loss = lambda c, t: info_nce(c, t, TEXTS, HISTORIES, LOG_SHARES, objective=objective).sum()
  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(context_ED, target_ED)
  assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads)
  np.testing.assert_array_equal(grads[0][1], 0)
  np.testing.assert_array_equal(grads[1][3], 0)


def test_no_span_at_all():
  empty_E = jnp.zeros(3, int)
  total = lambda context_ED: info_nce(context_ED, context_ED, empty_E, empty_E, objective=Objective()).sum()
  nll, grad_ED = jax.value_and_grad(total)(jnp.zeros((3, 2)))
  assert nll == 0 and (grad_ED == 0).all()


def test_unit_vectors():
  x_ED = np.array([[3.0, 4.0], [0.0, 0.0], [-1e-3, 0.0]], np.float32)
  np.testing.assert_allclose(unit(x_ED), [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
  assert unit(x_ED.astype(jnp.bfloat16)).dtype == jnp.float32
  np.testing.assert_array_equal(jax.grad(lambda x: unit(x).sum())(x_ED)[1], 0)


def test_the_directions_are_transposed_problems():
  (context_ED, target_ED), there, back = vectors(), Objective(), Objective(direction='target_to_context')
  to_target = info_nce(context_ED, target_ED, TEXTS, HISTORIES, objective=there)
  to_context = info_nce(context_ED, target_ED, TEXTS, HISTORIES, objective=back)
  np.testing.assert_allclose(to_context, info_nce(target_ED, context_ED, TEXTS, HISTORIES, objective=there), rtol=1e-5)
  assert np.abs(to_target - to_context)[USED].max() > 1e-2
  both = info_nce(context_ED, target_ED, TEXTS, HISTORIES, objective=Objective(direction='symmetric'))
  np.testing.assert_allclose(both, (to_target + to_context) / 2, rtol=1e-5)


def test_one_history_has_no_negatives_of_its_own():
  context_ED, target_ED = vectors(n=3)
  objective = Objective(mask_same_history=True)
  nll_E = info_nce(context_ED, target_ED, np.array([1, 2, 3]), np.zeros(3, int), objective=objective)
  np.testing.assert_allclose(nll_E, 0, atol=1e-6)


def test_weighted_mean_is_over_the_whole_array():
  values, weights = np.array([[1.0, 5.0], [9.0, 100.0]]), np.array([[1.0, 1.0], [1.0, 0.0]])
  assert weighted_mean(values, weights) == 5.0
  assert weighted_mean(values, np.zeros((2, 2))) == 0.0


def test_the_terms_are_weighted():
  np.testing.assert_allclose(Objective().total(2.0, 3.0, 5.0), 0.85 * 2 + 0.125 * 3 + 0.025 * 5)
  np.testing.assert_allclose(Objective(alpha=0, beta=0).total(2.0, 3.0, 5.0), 2.0)
  np.testing.assert_allclose(Objective(alpha=0.5, beta=0.5).total(2.0, 3.0, 5.0), 4.0)


@pytest.mark.parametrize('options, message', [
    (dict(alpha=-0.1), 'alpha'), (dict(alpha=0.8, beta=0.3), 'their sum at most 1'),
    (dict(temperature=0), 'temperature'), (dict(sampling_correction=1.1), r'sampling_correction = 1.1: from 0 \(none\)'),
    (dict(direction='both'), "'both': choose one of")])
def test_bad_options(options, message):
  with pytest.raises(UserError, match=message):
    Objective(**options)


def check_full_softmax(objective, correction):
  """A batch that holds each text as often as its share has the gradient of a softmax over the catalogue of cosine / τ and
  what the correction leaves of the log shares."""
  counts = np.array([1, 4, 2, 1])
  texts, log_shares_T = np.repeat(np.arange(4), counts), jnp.log(counts / 8)
  context_D, catalogue_TD = vectors(n=4)[0][0], vectors(n=4)[1]
  def in_batch(context_D):
    context_ED = jnp.zeros((8, D)).at[3].set(context_D)  # of text 1
    return info_nce(context_ED, catalogue_TD[texts], texts + 1, jnp.arange(8), log_shares_T[texts], objective=objective)[3]
  def full(context_D):
    logits_T = unit(catalogue_TD) @ unit(context_D[None])[0] / objective.temperature
    return -jax.nn.log_softmax(logits_T + (1 - correction) * log_shares_T)[1]
  np.testing.assert_allclose(jax.grad(in_batch)(context_D), jax.grad(full)(context_D), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('correction', [0.0, 0.6, 1.0])
def test_it_is_a_softmax_over_the_catalogue_of_what_the_correction_says(correction):
  objective = Objective(sampling_correction=correction, mask_same_text=False)
  check_full_softmax(objective, correction)
  with pytest.raises(AssertionError):
    check_full_softmax(dataclasses.replace(objective, sampling_correction=0.3), correction)
