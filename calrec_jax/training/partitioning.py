"""Partitioning: logical axis names to mesh axes, and the shardings of parameters, optimizer state and batches."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from calrec_jax.errors import UserError

# Logical axis -> mesh axes; None is replicated. The only place that names mesh axes.
AXIS_RULES = {
    'batch': ('data', 'fsdp'), 'lookup_rows': 'data', 'length': None, 'activation_embed': None, 'layers': None,
    'vocab': 'model', 'embed': 'fsdp', 'mlp': 'model', 'heads': 'model', 'kv_heads': 'model', 'kv': None, 'norm': None,
    'lora': None}


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """How many devices lie along each mesh axis; -1 once: all that are left."""

  data: int = -1
  fsdp: int = 1
  model: int = 1

  def build(self, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices; several TPU slices lie along `data`. Raises UserError where the axes do not make them up."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.astuple(self)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or min(sizes) < -1 or 0 in sizes or len(devices) % known:
      raise UserError(f'mesh (data, fsdp, model) = {sizes} does not divide {len(devices)} devices; leave one axis at -1.')
    sizes = tuple(len(devices) // known if size == -1 else size for size in sizes)
    if math.prod(sizes) != len(devices):
      raise UserError(f'mesh (data, fsdp, model) = {sizes} has {math.prod(sizes)} places for {len(devices)} devices; '
                      'leave one axis at -1.')
    names, types = ('data', 'fsdp', 'model'), (AxisType.Auto,) * 3
    # Processes on CPU call themselves slices too.
    slices = len({getattr(device, 'slice_index', None) if device.platform == 'tpu' else None for device in devices})
    if slices == 1:  # an axis may take a part of a dimension of the torus: 8 x 8 of 4 x 4 x 4 chips
      places = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
      return Mesh(places, names, axis_types=types)
    if sizes[0] % slices:
      raise UserError(f'mesh (data, fsdp, model) = {sizes}: `data` lies over {slices} slices; make it a multiple of that.')
    # Slices are linked by the network alone: the outer part of `data`, whose gradients are summed once a step, lies over them.
    places = mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices,
                                                  allow_split_physical_axes=True)
    return Mesh(places, names, axis_types=types)


def partition_spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh) -> P:
  """The mesh axes of an array; an axis that its mesh axes do not divide is replicated.

  Raises ValueError for a name that has no rule.
  """
  unknown = [name for name in names if name is not None and name not in AXIS_RULES]
  if unknown:
    raise ValueError(f'No sharding rule for {unknown}; add one to AXIS_RULES (known: {sorted(AXIS_RULES)}).')
  if len(names) != len(shape):  # statistics of an optimizer that are not of the parameter's shape
    return P()
  axes = [AXIS_RULES[name] if name else None for name in names]
  sizes = [math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())) for axis in axes]
  return P(*(axis if size % parts == 0 else None for axis, size, parts in zip(axes, shape, sizes, strict=True)))


def shardings(boxed: Any, mesh: Mesh) -> Any:
  """A NamedSharding for each array of a tree of boxed (logically named) or plain abstract arrays, without the boxes."""
  def sharding(leaf: Any) -> NamedSharding:
    if isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, partition_spec(leaf.value.shape, leaf.names, mesh))
    return NamedSharding(mesh, P())
  return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over all data-parallel devices."""
  return NamedSharding(mesh, P(AXIS_RULES['batch']))


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
  """Raises UserError unless the rows of each microbatch divide evenly over the data-parallel devices."""
  if microbatches < 1:
    raise UserError(f'train.microbatches = {microbatches}: give at least 1.')
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size < 1 or batch_size % (parts * microbatches):
    into = f'into {microbatches} microbatches ' if microbatches > 1 else ''
    raise UserError(f'BATCH_SIZE = {batch_size} rows do not divide {into}over {parts} data-parallel devices (mesh '
                    f'{dict(mesh.shape)}); choose a multiple of {parts * microbatches}.')


def global_batch(build: Callable[[slice], dict[str, np.ndarray]], batch_size: int,
                 sharding: NamedSharding) -> dict[str, jax.Array]:
  """One global batch, of which this process builds only the rows of its own devices.

  Args:
    build: rows -> their arrays.
    batch_size: rows of the global batch.
    sharding: how rows lie over the mesh.
  """
  own = {index[0].indices(batch_size)[:2] for index in sharding.addressable_devices_indices_map((batch_size,)).values()}
  parts = {rows: build(slice(*rows)) for rows in own}
  def array(name: str) -> jax.Array:
    shape = (batch_size, *next(iter(parts.values()))[name].shape[1:])
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[index[0].indices(batch_size)[:2]][name])
  return {name: array(name) for name in next(iter(parts.values()))}


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
  """Inside, modules' logical constraints hold on this mesh. (Under `with mesh:` alone Flax would pass over them in silence.)"""
  with jax.set_mesh(mesh), nn.logical_axis_rules(list(AXIS_RULES.items())):
    yield
