"""Cloud TPU chips: what their makers publish of them. The peak of arithmetic is that of `models.flops`.

Sources: the pages of Cloud TPU's documentation, https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. They give the
bandwidth between chips for all links of a chip and both directions together; here it is one link's, one way: divided by twice
the number of links (v4: 2,400 Gbit/s one way over 6 links). For the data-center network they give that of a pod or a chip; for
v4 they do not.
"""

import dataclasses

from calrec_jax.models.flops import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip.

  Attributes:
    name: as topologies are named.
    kind: JAX's `device_kind`.
    dimensions: of the torus that links chips.
    largest: chips of the largest slice.
    cores: that share the work of a device and have memories of their own in libtpu's description; 1: no such thing.
    wraps: chips along a dimension from which on it is a ring.
    hbm: bytes of memory.
    hbm_rate: bytes a second between memory and chip.
    link_rate: bytes a second over one link to a neighbour, one way. There are two links a dimension.
    network_rate: bytes a second of a chip's share of the data-center network, between slices; None: not published.
  """

  name: str
  kind: str
  dimensions: int
  largest: int
  cores: int
  wraps: int
  hbm: int
  hbm_rate: float
  link_rate: float
  network_rate: float | None

  @property
  def flops(self) -> float:
    """Operations a second, in bfloat16."""
    return peak_flops(self.kind)


_GIB = 1024**3
CHIPS = {chip.name: chip for chip in (
    Chip('v4', 'TPU v4', 3, 4096, 2, 4, 32 * _GIB, 1228e9, 50e9, None),
    Chip('v5e', 'TPU v5 lite', 2, 256, 1, 16, 16 * _GIB, 819e9, 50e9, 6.4e12 / 8 / 256),
    Chip('v5p', 'TPU v5', 3, 6144, 1, 4, 95 * _GIB, 2765e9, 100e9, 50e9 / 8),
    Chip('v6e', 'TPU v6 lite', 2, 256, 1, 16, 32 * _GIB, 1638e9, 100e9, 25.6e12 / 8 / 256))}
