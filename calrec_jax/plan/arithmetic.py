"""Operations of a program's products, counted in what JAX traced: exact where loops have a length, whatever the compiler does.

What the backward pass computes anew counts, as the device does it; `models.flops` counts what the model needs.
"""

import math
from typing import Any

import jax


def product_flops(traced: Any, unknown_trips: int = 1) -> float:
  """Of all devices together.

  Args:
    traced: of `jax.jit(…).trace(…)`.
    unknown_trips: how often a loop runs whose length depends on data.
  """
  return _flops(traced.jaxpr.jaxpr, unknown_trips)


def _flops(jaxpr: Any, unknown_trips: int) -> float:
  return sum(_of_equation(equation, unknown_trips) for equation in jaxpr.eqns)


def _of_equation(equation: Any, unknown_trips: int) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
  inner = [_flops(sub, unknown_trips) for sub in _subprograms(params)]
  if name == 'cond':
    return sum(inner) / len(inner)
  times = 1
  if name == 'scan':
    times = params['length']
  elif name == 'while':
    times = unknown_trips
  elif name == 'shard_map':
    times = params['mesh'].size
  elif name == 'pallas_call':  # of a step of the grid; blocks that nothing sees are half of a choice
    times = math.prod(params['grid_mapping'].grid)
  return times * sum(inner)


def _subprograms(params: dict[str, Any]) -> list[Any]:
  """The jaxprs among an equation's parameters."""
  leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
  found = [getattr(leaf, 'jaxpr', leaf) for leaf in leaves]
  return [leaf for leaf in found if hasattr(leaf, 'eqns')]
