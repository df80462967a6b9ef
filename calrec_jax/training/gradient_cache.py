"""Gradient caching: the gradient of a global batch whose activations do not fit, one microbatch at a time (Gao et al. 2021).

InfoNCE compares every span with every span of the global batch, so its gradient is no sum over microbatches. It is one given
the embeddings: (1) all microbatches are embedded, without keeping activations; (2) the contrastive loss of all embeddings
gives the gradient of each; (3) each microbatch runs again, and its embeddings' gradients are pulled back through it, with that
of its share of L_NIG. This is the full batch's gradient (law 3), for one more forward pass.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from calrec_jax.models import two_tower
from calrec_jax.models.two_tower import Batch, Pooled, Terms, TwoTower
from calrec_jax.training import rounding


def _parts(tree: Any, n: int) -> Any:
  """[B, …] to [n, B / n, …]: part i has the rows i, i + n, …, so that each device's rows stay on it."""
  def cut(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1)
    return nn.with_logical_constraint(x, (None, 'batch', *(None,) * (x.ndim - 2)))
  return jax.tree.map(cut, tree)


def _whole(tree: Any) -> Any:
  """[n, B / n, …] to [B, …]: what `_parts` took apart."""
  def joined(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
    return nn.with_logical_constraint(x, ('batch', *(None,) * (x.ndim - 1)))
  return jax.tree.map(joined, tree)


def gradients(model: TwoTower, merge: Callable[[Any], Any], params: Any, batch: Batch, rng: jax.Array,
              microbatches: int) -> tuple[Any, Terms]:
  """The gradient of the global batch's loss, float32, and the loss with its terms.

  Args:
    model: the objective.
    merge: trained parameters -> all parameters.
    params: the trained ones, by which the loss is differentiated.
    batch: the global batch, of B rows.
    rng: of dropout; each microbatch folds its number into it.
    microbatches: how many; B is a multiple. Memory holds the activations of one, and the embeddings of all.
  """
  objective = model.objective
  parts = _parts(dict(batch), microbatches)
  rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(microbatches))
  def run(params: Any, part: Batch, rng: jax.Array, method: Callable) -> Any:
    return model.apply({'params': merge(params)}, part, train=True, rngs={'dropout': rng}, method=method)

  terms, pulls = two_tower.no_contrast(), None
  if objective.contrasts:
    _, rows = jax.lax.scan(lambda _, one: (None, run(params, *one, TwoTower.embed_rows)), None, (parts, rngs))
    def contrastive(rows: Pooled) -> tuple[jax.Array, Terms]:
      terms = two_tower.contrast(two_tower.towers(rows, batch), batch, objective)
      return objective.alpha * terms['tt'] + objective.beta * terms['ut'], terms
    pulls, terms = jax.grad(contrastive, has_aux=True)(_whole(rows))
    pulls = _parts(pulls, microbatches)

  def share(params: Any, part: Batch, rng: jax.Array, pull: Pooled | None) -> tuple[jax.Array, jax.Array]:
    """A scalar whose gradient is this microbatch's share of the whole one, and the nats of its target tokens."""
    nll, rows = run(params, part, rng, TwoTower.rows)
    pulled = jax.tree.map(lambda x, g: jnp.sum(x * g), rows, pull)
    return objective.total(two_tower.mean_nll(nll, batch), 0.0, 0.0) + sum(jax.tree.leaves(pulled)), nll
  def add(sums: tuple[Any, jax.Array], one: tuple[Any, ...]) -> tuple[tuple[Any, jax.Array], None]:
    grads, nll = jax.grad(share, has_aux=True)(params, *one)
    return jax.tree.map(jnp.add, sums, (rounding.as_float32(grads), nll)), None
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  (grads, nll), _ = jax.lax.scan(add, (zeros, jnp.zeros(())), (parts, rngs, pulls))
  return grads, two_tower.summary(nll, terms, batch, objective)[1]
