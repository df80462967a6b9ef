"""How long a step takes at least: a roofline of arithmetic, memory and links (Williams et al. 2009).

Each resource is taken to work at its published peak, beside the others: a step lasts as long as the slowest. Real steps take
longer, as products of small matrices do not reach the peak, and not all of a transfer is hidden.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.plan.chips import Chip
from calrec_jax.plan.traffic import DCN, Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step that each resource needs.

  Attributes:
    arithmetic: of the products.
    memory: of what moves between memory and chip.
    links: of what crosses chips, by mesh axis.
  """

  arithmetic: float
  memory: float
  links: dict[str, float]

  @property
  def seconds(self) -> float:
    """Of the slowest. All axes' transfers are taken one after the other."""
    return max(self.arithmetic, self.memory, sum(self.links.values()))

  @property
  def bound(self) -> str:
    """The slowest resource."""
    of = {'arithmetic': self.arithmetic, 'memory': self.memory, 'links': sum(self.links.values())}
    return max(of, key=of.get)


def roofline(chip: Chip, *, flops: float, traffic: float, collectives: Sequence[Collective],
             rates: dict[str, float]) -> Roofline:
  """Of one step.

  Args:
    chip: whose peaks count.
    flops: of the products of one device.
    traffic: bytes of one device between memory and chip.
    collectives: what crosses chips.
    rates: bytes a second of each mesh axis, of `axis_rates`.
  """
  links: dict[str, float] = {}
  for one in collectives:
    name = '+'.join(one.axes)
    rate = min((rates[axis] for axis in one.axes), default=None)  # a collective over two axes is as slow as the slower one
    if rate is not None:
      links[name] = links.get(name, 0.0) + one.sent / rate
  return Roofline(flops / chip.flops, traffic / chip.hbm_rate, links)


def axis_rates(chip: Chip, coords: np.ndarray, names: Sequence[str], slices: int = 1) -> dict[str, float]:
  """Bytes a second that a device can send around the ring of each mesh axis.

  An axis has the links of every dimension of the torus along which its devices lie, both ways where they close to a ring.

  Args:
    chip: of the devices.
    coords: int [sizes of the mesh axes, dimensions of the torus], where in its slice each device of the mesh is.
    names: of the mesh axes.
    slices: into which the first axis is divided.

  Raises:
    UserError: several slices of a chip whose network's speed is not published.
  """
  if slices > 1:
    coords = coords.reshape(slices, coords.shape[0] // slices, *coords.shape[1:])[0]
  largest = coords.reshape(-1, coords.shape[-1]).max(axis=0) + 1  # of the whole slice
  rates = {}
  for axis, name in enumerate(names):
    spread = np.ptp(coords, axis=axis).reshape(-1, coords.shape[-1]).max(axis=0) > 0
    ways = sum(2 if largest[dimension] >= chip.wraps else 1 for dimension in np.flatnonzero(spread))
    rates[name] = max(ways, 1) * chip.link_rate
  if slices > 1:
    if chip.network_rate is None:
      raise UserError(f'The network between slices of {chip.name} has no published speed; plan one slice.')
    rates[DCN] = chip.network_rate
  return rates
