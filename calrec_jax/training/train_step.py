"""The training step: state and its shardings, one pure update, one pure evaluation."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from calrec_jax.models.two_tower import TwoTower
from calrec_jax.text.rows import Shapes
from calrec_jax.training import gradient_cache, partitioning, rounding, trainable
from calrec_jax.training.trainable import IsTrained

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """All that a step changes or reads: `rng` is the run's key, folded with the step for dropout.

  `average` is a moving average of the trained parameters, or None.
  """

  step: jax.Array
  rng: jax.Array
  params: Any
  opt_state: Any
  average: Any = None

  @property
  def judged(self) -> Any:
    """The parameters that the run is about: averaged where there is an average."""
    return self.params if self.average is None else trainable.join(self.params, self.average)


def init_params(model: TwoTower, rng: jax.Array, shapes: Shapes) -> Any:
  """Boxed (logically named) parameters, drawn at random."""
  small = Shapes(B=1, L=min(shapes.L, 8), M=min(shapes.M, 8), E=1, S=1)
  batch = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in small.features().items()}
  return model.init(rng, batch)['params']


def new_state(model: TwoTower, optimizer: optax.GradientTransformation, shapes: Shapes, seed: int, mesh: Mesh,
              trained: IsTrained = lambda path: True, averages: bool = False,
              ) -> tuple[Callable[..., TrainState], TrainState]:
  """(a function that makes the state on the mesh, the state's shardings).

  The function takes parameters that are there already, whose memory it takes over; the others are drawn at random. The
  optimizer has a state for the trained ones only.
  """
  def boxed_state(loaded: Any) -> TrainState:
    init_rng, rng = jax.random.split(jax.random.key(seed))
    params = trainable.join(init_params(model, init_rng, shapes), loaded)
    moving = trainable.split(params, trained)[0]
    # A copy of its own: the memory of params is given to the next step's.
    average = jax.tree.map(jnp.copy, moving) if averages else None
    return TrainState(jnp.zeros((), jnp.int32), jax.random.key_data(rng), params,
                      optimizer.init(rounding.as_float32(moving)), average)
  shardings = partitioning.shardings(jax.eval_shape(lambda: boxed_state({})), mesh)
  make = jax.jit(lambda loaded: nn.unbox(boxed_state(loaded)), out_shardings=shardings, donate_argnums=0)
  return lambda loaded=None: make(loaded or {}), shardings


def make_train_step(model: TwoTower, optimizer: optax.GradientTransformation, mesh: Mesh, shardings: TrainState,
                    trained: IsTrained = lambda path: True, microbatches: int = 1, average_decay: float = 0.0,
                    ) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
  """The jitted update; the old state's memory is reused for the new one. What is not trained has no gradient either.

  `average_decay`: see `Optimizer`. With several `microbatches` the gradient is that of the whole batch, see `gradient_cache`.
  """
  def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    params, fixed = trainable.split(state.params, trained)
    merge = lambda params: trainable.join(fixed, params)
    if microbatches > 1:
      grads, metrics = gradient_cache.gradients(model, merge, params, batch, rng, microbatches)
    else:
      loss = lambda params: model.apply({'params': merge(params)}, batch, train=True, rngs={'dropout': rng})
      grads, metrics = jax.grad(loss, has_aux=True)(params)
    grads, params32 = rounding.as_float32(grads), rounding.as_float32(params)
    updates, opt_state = optimizer.update(grads, state.opt_state, params32)
    metrics['gradient_norm'] = optax.global_norm(grads)
    params32 = optax.apply_updates(params32, updates)
    params = rounding.store(params32, params, jax.random.fold_in(rng, 1))
    average = state.average
    if average is not None:
      # Young averages forget faster: what they began with is no better than what follows.
      decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
      moved = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), rounding.as_float32(average), params32)
      average = rounding.store(moved, average, jax.random.fold_in(rng, 2))
    return TrainState(state.step + 1, state.rng, trainable.join(fixed, params), opt_state, average), metrics
  return _on_mesh(jax.jit(train_step, in_shardings=(shardings, partitioning.batch_sharding(mesh)),
                          out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0,
                          compiler_options=_compiler_options(mesh.devices.flat[0].platform)), mesh)


@functools.cache
def _compiler_options(platform: str) -> dict[str, str]:
  """On CPU, XLA's own products: those of the YNN library share the cores badly with what runs beside them in a step."""
  options = {'xla_cpu_experimental_ynn_fusion_type': ''}
  if platform != 'cpu':
    return {}
  try:
    jax.jit(lambda: 0, compiler_options=options).lower().compile()
  except Exception:  # an experimental option: other versions of XLA may not know it, and do without
    return {}
  return options


def make_eval_step(model: TwoTower, mesh: Mesh, param_shardings: Any,
                   ) -> Callable[[Any, dict[str, jax.Array]], tuple[Metrics, jax.Array]]:
  """The jitted loss terms of one batch, without dropout, and v_U of its spans, [B, E, D] on every device."""
  return _reading(model, TwoTower.validate, mesh, param_shardings)


def make_embed_texts(model: TwoTower, mesh: Mesh, param_shardings: Any) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
  """The jitted v_T of the texts of alone rows, [B, S, D] on every device."""
  return _reading(model, TwoTower.embed_texts, mesh, param_shardings)


def _reading(model: TwoTower, method: Callable, mesh: Mesh, param_shardings: Any) -> Callable:
  """A method of the model, jitted, that changes nothing."""
  def read(params: Any, batch: dict[str, jax.Array]) -> Any:
    return model.apply({'params': params}, batch, method=method)
  return _on_mesh(jax.jit(read, in_shardings=(param_shardings, partitioning.batch_sharding(mesh)),
                          out_shardings=NamedSharding(mesh, P())), mesh)


def _on_mesh(function: Any, mesh: Mesh) -> Callable:
  """A jitted function, with the mesh that its constraints name; `lower` and `trace` too."""
  # Processes on CPU connect in a first collective, and give up on one that is half a minute late: all compile before it.
  waits = jax.process_count() > 1 and mesh.devices.flat[0].platform == 'cpu'

  def within(call: Callable) -> Callable:
    def on_it(*args: Any) -> Any:
      with partitioning.on_mesh(mesh):
        return call(*args)
    return on_it

  def call(*args: Any) -> Any:
    nonlocal waits
    if waits:
      function.lower(*args).compile()
      multihost.sync_global_processes(f'calrec_jax.{function.__name__}')
      waits = False
    return function(*args)
  called = within(call)
  called.lower, called.trace = within(function.lower), within(function.trace)
  return called
