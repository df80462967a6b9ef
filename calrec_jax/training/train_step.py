"""The training step: state and its shardings, one pure update, one pure evaluation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.rows import Shapes
from calrec_jax.training import partitioning

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """All that a step changes or reads: `rng` is the run's key, folded with the step for dropout."""

  step: jax.Array
  rng: jax.Array
  params: Any
  opt_state: Any


def init_params(model: TwoTower, rng: jax.Array, shapes: Shapes) -> Any:
  """Boxed (logically named) parameters, drawn at random."""
  small = Shapes(B=1, L=min(shapes.L, 8), M=min(shapes.M, 8), Q=1, E=1, S=1)
  batch = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in small.features().items()}
  return model.init(rng, batch)['params']


def new_state(model: TwoTower, optimizer: optax.GradientTransformation, shapes: Shapes, seed: int,
              mesh: Mesh) -> tuple[Callable[[], TrainState], TrainState]:
  """(a function that makes the state on the mesh, the state's shardings)."""
  def boxed_state() -> TrainState:
    init_rng, rng = jax.random.split(jax.random.key(seed))
    params = init_params(model, init_rng, shapes)
    return TrainState(jnp.zeros((), jnp.int32), jax.random.key_data(rng), params, optimizer.init(params))
  shardings = partitioning.shardings(jax.eval_shape(boxed_state), mesh)
  return jax.jit(lambda: nn.unbox(boxed_state()), out_shardings=shardings), shardings


def make_train_step(model: TwoTower, optimizer: optax.GradientTransformation, mesh: Mesh,
                    shardings: TrainState) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
  """The jitted update; the old state's memory is reused for the new one."""
  def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    rngs = {'dropout': jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)}
    loss = lambda params: model.apply({'params': params}, batch, train=True, rngs=rngs)
    grads, metrics = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics['gradient_norm'] = optax.global_norm(grads)
    return TrainState(state.step + 1, state.rng, optax.apply_updates(state.params, updates), opt_state), metrics
  return _on_mesh(jax.jit(train_step, in_shardings=(shardings, partitioning.batch_sharding(mesh)),
                          out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0), mesh)


def make_eval_step(model: TwoTower, mesh: Mesh, param_shardings: Any) -> Callable[[Any, dict[str, jax.Array]], Metrics]:
  """The jitted loss terms of one batch, without dropout."""
  def eval_step(params: Any, batch: dict[str, jax.Array]) -> Metrics:
    return model.apply({'params': params}, batch)[1]
  return _on_mesh(jax.jit(eval_step, in_shardings=(param_shardings, partitioning.batch_sharding(mesh)),
                          out_shardings=NamedSharding(mesh, P())), mesh)


def _on_mesh(function: Callable, mesh: Mesh) -> Callable:
  def call(*args: Any) -> Any:
    with partitioning.on_mesh(mesh):
      return function(*args)
  return call
