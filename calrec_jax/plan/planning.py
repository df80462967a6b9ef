"""Plans a run: compiles its programs for a topology, and says what they hold, compute and send, and how long that takes."""

import dataclasses
import logging
import re
from typing import Any

import jax
import numpy as np

from calrec_jax.errors import UserError
from calrec_jax.models.decoder import abstract_params
from calrec_jax.models.flops import training_flops
from calrec_jax.plan import arithmetic, estimate, hlo, meshes, programs, topology, traffic
from calrec_jax.plan.programs import Inference, Traced, Training
from calrec_jax.plan.topology import Topology
from calrec_jax.training.partitioning import MeshShape

# How the compiler says that a program does not fit: of all that it holds, or of what comes and goes.
_FULL = re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm')
_TOO_MANY = re.compile(r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """How to plan.

  Attributes:
    topology: CHIP:SHAPE, or CHIP:SHAPE*SLICES, see `topology.parse`.
    tries: meshes that are compiled: the one that is set, then the most promising others.
    price: dollars of a chip and hour, or None.
  """

  topology: str | None = None
  tries: int = 3
  price: float | None = None

  def __post_init__(self):
    if self.tries < 1 or (self.price is not None and self.price < 0):
      raise UserError(f'plan.tries = {self.tries}, plan.price = {self.price}: give at least 1 mesh, and dollars, 0 or more.')


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program.

  Attributes:
    module: its text, read; None where it does not fit.
    memory: bytes of a device: what is held before it begins, by what it is; `activations`, all that comes and goes;
      `program`; `total`; `capacity`.
    flops: of the products, all devices together.
  """

  module: hlo.Module | None
  memory: dict[str, int]
  flops: float

  @property
  def fits(self) -> bool:
    return self.module is not None


def compiled(traced: Traced, capacity: int, unknown_trips: int = 1) -> Compiled:
  """Compiles a program; one that does not fit has its `total` from the compiler's refusal."""
  flops = arithmetic.product_flops(traced.traced, unknown_trips)
  try:
    program = traced.traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    held, whole = sum(traced.held.values()), _FULL.search(str(error))
    if not (found := whole or _TOO_MANY.search(str(error))):
      raise
    used, capacity = (int(float(n) * _UNITS[unit]) for n, unit in (found.groups()[:2], found.groups()[2:]))
    activations = max(used - held, 0) if whole else used
    return Compiled(None, {**traced.held, 'activations': activations, 'total': held + activations, 'capacity': capacity}, flops)
  sizes = program.memory_analysis()
  # What is given back (`alias`) lies where it was held; the arguments are what `held` says, padded as the device has them.
  activations = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  padding = max(sizes.argument_size_in_bytes - sum(traced.held.values()), 0)
  memory = {**traced.held, 'activations': activations, 'program': sizes.generated_code_size_in_bytes, 'padding': padding}
  total = sum(memory.values())
  return Compiled(hlo.parse(program.as_text()), {**memory, 'total': total, 'capacity': capacity}, flops)


def plan_training(training: Training, where: Topology, mesh_shape: MeshShape) -> dict[str, Any]:
  """The report of a training step on one mesh.

  Returns:
    Values as JSON has them: `mesh`, `shapes`; `memory` in bytes of a device, `fits`; `flops` of all devices: of the products
    as they run, and `useful` ones (`models.flops`); `traffic`, bytes of a device between memory and chip; `collectives`;
    `callbacks`, instructions that call the host; and, of a step at the published peaks, `seconds`, what bounds it, and rates.

  Raises:
    UserError: the mesh, or the batch, does not divide.
  """
  devices = topology.devices(where)
  mesh = mesh_shape.build(devices)
  logging.info('Compiling a training step for %s, mesh %s ...', where, tuple(mesh.shape.values()))
  trips = -(-int(training.target_tokens) // (mesh.shape['data'] * mesh.shape['fsdp'] * training.head_block))
  found = compiled(programs.train_step(training, mesh), where.chip.hbm, max(trips, 1))
  report = {'topology': str(where), 'chips': where.chips, 'mesh': dict(mesh.shape), 'batch_size': training.batch_size,
            'shapes': dataclasses.asdict(training.shapes), 'memory': found.memory, 'fits': found.fits}
  if found.module is None:
    return report
  crossing = traffic.collectives(found.module, dict(mesh.shape), where.slices, trips)
  moved = traffic.memory_traffic(found.module, trips)
  coords = np.asarray([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
  roofline = estimate.roofline(
      where.chip, flops=found.flops / len(devices), traffic=moved, collectives=crossing,
      rates=estimate.axis_rates(where.chip, coords, mesh.axis_names, where.slices))
  useful = training_flops(training.decoder, training.segments, training.target_tokens)
  spans = training.batch_size * training.spans
  return report | {
      'flops': {'products': found.flops, 'useful': useful}, 'traffic': moved,
      'collectives': [{'kind': one.kind, 'axes': list(one.axes), 'bytes': one.bytes, 'times': one.times, 'sent': one.sent,
                       'source': one.source} for one in sorted(crossing, key=lambda one: -one.sent)],
      'callbacks': traffic.host_callbacks(found.module),
      'seconds': roofline.seconds, 'bound': roofline.bound, 'roofline': dataclasses.asdict(roofline),
      'tokens_per_second': training.tokens / roofline.seconds, 'spans_per_second': spans / roofline.seconds,
      'mfu': useful / (roofline.seconds * where.chips * where.chip.flops)}


def plan_inference(training: Training, where: Topology, inference: Inference) -> dict[str, Any]:
  """The report of prefill and of a decoding step, of one device: each process samples for users of its own on its first one."""
  device = topology.devices(where)[0]
  reports = {}
  for name, traced in programs.prefill_and_decode(training.decoder, inference, device).items():
    logging.info('Compiling %s for one device ...', name)
    found = compiled(traced, where.chip.hbm)
    reports[name] = {'memory': found.memory, 'fits': found.fits}
    if found.module is not None:
      moved = traffic.memory_traffic(found.module)
      roofline = estimate.roofline(where.chip, flops=found.flops, traffic=moved, collectives=[], rates={})
      reports[name] |= {'flops': found.flops, 'traffic': moved, 'seconds': roofline.seconds, 'bound': roofline.bound}
  return reports


def suggest(training: Training, where: Topology, mesh_shape: MeshShape, tries: int) -> list[dict[str, Any]]:
  """Reports of the mesh that is set and of the most promising others, so many compiled in all; the fastest that fits first."""
  config = programs.for_tpu(training.decoder)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
  devices = topology.devices(where)
  first = MeshShape(**dict(mesh_shape.build(devices).shape))
  others = [each.mesh for each in meshes.ranked(len(devices), training, parameters, where.chip, where.slices)
            if each.mesh != first]
  reports = [plan_training(training, where, mesh) for mesh in [first, *others][:tries]]
  return sorted(reports, key=lambda report: (not report['fits'], report.get('seconds', 0.0), report['memory']['total']))


def smallest_that_fits(training: Training, where: Topology) -> Topology | None:
  """The smallest larger slice on which the step fits with all parameters over `fsdp`; None if none does."""
  found = topology.larger(where)
  while found is not None:
    devices = len(topology.devices(found))
    if training.decoder.embed_dim % devices or training.batch_size % devices:
      return None
    if plan_training(training, found, MeshShape(1, -1, 1))['fits']:
      return found
    found = topology.larger(found)
  return None
