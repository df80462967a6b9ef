"""Which parameters are trained: all; all but the frozen ones; or the low-rank factors alone."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import traverse_util

from calrec_jax.errors import UserError
from calrec_jax.models.decoder import abstract_params
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.lora import FACTORS

IsTrained = Callable[[tuple[str, ...]], bool]  # of a parameter's path


def is_trained(config: DecoderConfig, frozen: Sequence[str]) -> IsTrained:
  """Whether the parameter at a path is trained.

  Args:
    config: with a `lora_rank` the factors alone are.
    frozen: names on the paths of those that are not: `embedding`, `mlp`, `query`, …

  Raises:
    UserError: a name that no parameter has, or nothing is left to train.
  """
  if isinstance(frozen, str):
    raise UserError(f'train.frozen = {frozen!r}: is one text; write a list of names, [{frozen!r}].')
  paths = list(traverse_util.flatten_dict(abstract_params(config)))
  known = sorted({name for path in paths for name in path})
  if unknown := [name for name in frozen if name not in known]:
    raise UserError(f'train.frozen: no parameter is called {unknown[0]!r}; there are {", ".join(known)}.')
  def trained(path: tuple[str, ...]) -> bool:
    return (not config.lora_rank or path[-1] in FACTORS) and not set(path) & set(frozen)
  if not any(map(trained, paths)):
    raise UserError(f'train.frozen = {tuple(frozen)}: nothing is left to train; name fewer.')
  return trained


def split(params: Any, trained: IsTrained) -> tuple[Any, Any]:
  """(the trained parameters, the others), each a tree of its own."""
  flat = traverse_util.flatten_dict(params)
  part = lambda wanted: traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if trained(path) is wanted})
  return part(True), part(False)


def join(one: Any, other: Any) -> Any:
  """The tree that `split` took apart; where both have a parameter, the second one's."""
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(one) | traverse_util.flatten_dict(other))
