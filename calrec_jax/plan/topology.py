"""TPU topologies by name, such as `v5e:4x8`, and their devices, described by libtpu on a machine without a TPU."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from calrec_jax.errors import UserError
from calrec_jax.plan.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many slices of one shape: chips are linked within a slice, slices by the data-center network."""

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  def __str__(self) -> str:
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}' + (f'*{self.slices}' if self.slices > 1 else '')


def parse(text: str) -> Topology:
  """Reads CHIP:SHAPE or CHIP:SHAPE*SLICES. Raises UserError for an unknown chip, or a shape that it does not come in."""
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?', text)
  if not match:
    raise UserError(f'--topology {text}: write CHIP:SHAPE, such as v5e:4x8, or CHIP:SHAPE*SLICES, such as v5e:4x8*2.')
  if match[1] not in CHIPS:
    raise UserError(f'--topology {text}: unknown chip {match[1]!r}; choose one of {", ".join(CHIPS)}.')
  chip, shape, slices = CHIPS[match[1]], tuple(map(int, match[2].split('x'))), int(match[3] or 1)
  if len(shape) != chip.dimensions or 0 in shape or not slices or math.prod(shape) > chip.largest:
    example = {2: '4x8', 3: '2x2x4'}[chip.dimensions]
    raise UserError(f'--topology {text}: a slice of {chip.name} has {chip.dimensions} dimensions, such as {example}, and at '
                    f'most {chip.largest} chips.')
  return Topology(chip, shape, slices)


def larger(topology: Topology) -> Topology | None:
  """The next larger slice, its shortest dimension doubled; None past the largest."""
  shape = list(topology.shape)
  shape[shape.index(min(shape))] *= 2
  if math.prod(shape) > topology.chip.largest:
    return None
  return dataclasses.replace(topology, shape=tuple(sorted(shape)))


def prepare() -> None:
  """Lets libtpu describe TPUs that are not there; to be called before JAX computes anything. Raises as `_library` does."""
  os.environ.update(TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost', TPU_LIBRARY_PATH=_library())
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # no TPU is opened, so several processes may plan
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
  jax.config.update('jax_platforms', 'cpu')  # where nothing but shapes is made


def _library() -> str:
  """Where libtpu is. Raises UserError where it is not installed, or is not the one that JAX asks for."""
  found = importlib.util.find_spec('libtpu')
  if found is None:
    raise UserError("`calrec plan` compiles with libtpu, which is not installed: pip install 'jax[tpu]'.")
  wanted = next(re.findall(r'libtpu==([\d.]+)', line)[0] for line in importlib.metadata.requires('jax') if 'libtpu==' in line)
  installed = importlib.metadata.version('libtpu')
  if not f'{installed}.'.startswith(wanted):
    raise UserError(f"libtpu {installed} does not belong to jax {importlib.metadata.version('jax')}, which asks for {wanted}*: "
                    "pip install 'jax[tpu]'.")
  return os.path.join(os.path.dirname(found.origin), 'libtpu.so')


def devices(topology: Topology) -> list[Any]:
  """The devices that JAX sees on the topology, one a chip. Raises UserError where libtpu does not know it."""
  options: dict[str, Any] = {'num_slices': topology.slices} if topology.slices > 1 else {}
  if topology.chip.cores > 1:
    options['chip_config_name'] = 'megacore'  # as TPU VMs have it: a chip's cores are one device
  name = f'{topology.chip.name}:{"x".join(map(str, topology.shape))}'
  if 1 in topology.shape[:2]:  # less than a host's four chips
    options['chips_per_host_bounds'] = (1, 1, 1) if topology.chips == 1 else (*topology.shape, 1)[:3]
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
  except Exception as error:  # jaxlib has a type of its own for each thing that can be wrong
    message = ' '.join(str(error).split())[:200]
    if 'INVALID_ARGUMENT' in message:
      raise UserError(f'--topology {topology}: libtpu has no such slice ({message}); choose another shape.') from error
    raise UserError(f'--topology {topology}: libtpu cannot describe it ({message}).') from error
