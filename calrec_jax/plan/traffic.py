"""What a compiled program moves: bytes between memory and chip, and over each mesh axis between chips."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from calrec_jax.plan.hlo import Array, Computation, Instruction, Module

DCN = 'dcn'  # between slices: the data-center network
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all', 'iota',
         'partition-id', 'replica-id', 'opt-barrier'}
_COPIES = ('copy-start', 'slice-start', 'dynamic-slice-start')  # the rest of them is `-done`
# What crosses slices goes by way of the hosts: a send and a receive, which say what they are part of.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CALLBACKS = re.compile(r'callback|outfeed|infeed|SendToHost|RecvFromHost', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of `COLLECTIVES`.
    axes: the mesh axes that it crosses, such as `('fsdp',)`.
    group: devices that take part together.
    bytes: of what a device holds after it; of a reduce-scatter, before it.
    times: how often it runs.
    arrays: (dtype, shape) of what a device holds after it.
    source: the JAX operation.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  bytes: int
  times: float
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  source: str

  @property
  def sent(self) -> float:
    """Bytes that each device sends for it, in a ring, all runs together."""
    share = (self.group - 1) / self.group
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share)
    return self.times * self.bytes * factor


def memory_traffic(module: Module, unknown_trips: int = 1) -> float:
  """Bytes that one device moves between its memory and the chip: what each fusion, product and copy reads and writes."""
  total = 0.0
  for one, computation, times in module.runs(unknown_trips):
    if one.opcode in _FREE or one.opcode.endswith('-done'):
      continue
    if one.opcode in _COPIES:  # their tuples hold the operands too
      result = one.arrays[1 if one.opcode != 'copy-start' else 0]
      total += times * result.bytes * (1 if result.on_chip or computation[one.operands[0]].arrays[0].on_chip else 2)
    else:
      total += times * (_written(one, module) + _read(one, computation, module))
  return total


def _in_memory(arrays: Sequence[Array]) -> int:
  return sum(array.bytes for array in arrays if not array.on_chip)


def _fused(one: Instruction, module: Module) -> Computation | None:
  return module.computations[one.called[0]] if one.opcode == 'fusion' and one.called else None


def _written(one: Instruction, module: Module) -> int:
  """What an instruction writes: of an update in place the update alone."""
  inner = _fused(one, module)
  if inner is None:
    if one.opcode == 'dynamic-update-slice':
      return 0  # the update is read, and written: `_read` counts it
    return _in_memory(one.arrays)
  root = next(each for each in inner.values() if each.is_root)
  parts = [inner[name] for name in root.operands if name in inner] if root.opcode == 'tuple' else [root]
  total = 0
  for part, array in zip(parts, one.arrays, strict=False):
    update = _update(part, inner)
    total += 0 if array.on_chip else min(array.bytes, update) if update is not None else array.bytes
  return total


def _update(part: Instruction, inner: Computation) -> int | None:
  """Bytes of the update, if an instruction (or what it is a view of) updates a slice; None if it does not."""
  while part.opcode in ('bitcast', 'convert', 'copy') and part.operands and part.operands[0] in inner:
    part = inner[part.operands[0]]
  if part.opcode != 'dynamic-update-slice':
    return None
  return sum(array.bytes for array in inner[part.operands[1]].arrays) if part.operands[1] in inner else None


def _read(one: Instruction, computation: Computation, module: Module) -> int:
  """What an instruction reads: of an operand that it takes slices of, these."""
  inner = _fused(one, module)
  parameters = {int(re.match(r'\((\d+)\)', each.text)[1]): each.name
                for each in (inner or {}).values() if each.opcode == 'parameter'}
  total = 0
  for number, name in enumerate(one.operands):
    if name not in computation:
      continue
    whole = _in_memory(computation[name].arrays)
    if inner is not None and number in parameters:
      users = [each for each in inner.values() if parameters[number] in each.operands]
      if users and all(each.opcode in ('dynamic-slice', 'gather') or (
          each.opcode == 'dynamic-update-slice' and each.operands[0] == parameters[number]) for each in users):
        sliced = sum(array.bytes for each in users if each.opcode != 'dynamic-update-slice' for array in each.arrays)
        whole = min(whole, sliced)
    elif one.opcode in ('dynamic-slice', 'gather') and number == 0:
      whole = min(whole, sum(array.bytes for array in one.arrays))
    elif one.opcode == 'dynamic-update-slice' and number == 0:
      whole = 0
    total += whole
  return total


def collectives(module: Module, mesh_shape: dict[str, int], slices: int = 1, unknown_trips: int = 1) -> list[Collective]:
  """The collectives of a program, each once, with how often it runs.

  Args:
    module: the program.
    mesh_shape: sizes of the mesh axes, in order; a program numbers devices by their place in the mesh.
    slices: into which the first axis is divided: what crosses these has the axis `DCN`.
    unknown_trips: see `Module.runs`.
  """
  n_devices = int(np.prod(list(mesh_shape.values())))
  found: dict[tuple, Collective] = {}
  for outer, computation, times in module.runs(unknown_trips):
    for one in (outer, *module.inside(outer)):
      if one.opcode == 'send' and (between := _BETWEEN_SLICES.search(one.text)):
        kind, sent = between[1].lower().replace('_', '-'), one.arrays[:1]
        found[id(computation), one.name] = Collective(kind, (DCN,), slices, sent[0].bytes, times,
                                                      ((sent[0].dtype, sent[0].shape),), one.source)
        continue
      kind = one.opcode.removesuffix('-start')
      if kind not in COLLECTIVES:
        continue
      # One that runs beside other work stands there in parts, in fusions with that work, some of which may be in a loop: all
      # with its channel and source. Without a source, one channel may be of several loops.
      channel = re.search(r'channel_id=(\d+)', one.text)
      key = (channel[1], one.source or id(computation)) if channel else (id(computation), one.name)
      if key in found:
        found[key] = dataclasses.replace(found[key], times=min(times, found[key].times))
        continue
      if kind == 'all-reduce' and outer.called and outer.called[0].startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'  # each device takes its part of the sum, inside the fusion
      found[key] = _collective(one, kind, times, _groups(one.text, n_devices), mesh_shape, slices)
  return list(found.values())


def _collective(one: Instruction, kind: str, times: float, groups: list[list[int]], mesh_shape: dict[str, int],
                slices: int) -> Collective:
  arrays = one.arrays
  if one.opcode.endswith('-start') and kind != 'all-reduce':  # its tuple holds the operands too, a permutation's two handles
    arrays = arrays[:-2] if kind == 'collective-permute' else arrays
    arrays = arrays[len(arrays) // 2:]
  held = sum(array.bytes for array in arrays) * (len(groups[0]) if one.opcode.startswith('reduce-scatter') else 1)
  return Collective(kind, _axes(groups, mesh_shape, slices), len(groups[0]), held, times,
                    tuple((array.dtype, array.shape) for array in arrays), one.source)


def _groups(text: str, n_devices: int) -> list[list[int]]:
  """Which devices take part together."""
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', text):
    return [[int(a), int(b)] for a, b in re.findall(r'\{(\d+),(\d+)\}?', pairs[1] + '}')]
  if listed := re.search(r'replica_groups=\{\{(.*?)\}\}', text):
    return [[int(n) for n in group.split(',')] for group in listed[1].split('},{')]
  if counted := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    numbers = lambda text: [int(n) for n in text.split(',')]
    places = np.arange(np.prod(numbers(counted[2]))).reshape(numbers(counted[2]))
    places = places.transpose(numbers(counted[3])) if counted[3] else places
    return places.reshape(numbers(counted[1])).tolist()
  if meshed := re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}', text):
    return _mesh_groups(*meshed.groups(), n_devices)
  return [list(range(n_devices))]


def _mesh_groups(axes: str, order: str | None, over: str, n_devices: int) -> list[list[int]]:
  """Groups over some axes of a mesh of the compiler's own, `'a'=2,'b'=4`; a part of an axis is `'b':(size before it)size`."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  places = np.arange(n_devices)
  if order and (counted := re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', order)):
    places = places.reshape([int(n) for n in counted[1].split(',')])
    places = places.transpose([int(n) for n in counted[2].split(',')]) if counted[2] else places
  elif order:
    places = np.asarray([int(n) for n in re.findall(r'\d+', order)])
  parts, chosen = [], []
  for name, size in sizes.items():
    part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", over)
    before, taken = (1, 1) if part is None else (1, size) if part[1] is None else (int(part[1]), int(part[2]))
    chosen += [len(parts) + 1]
    parts += [before, taken, size // before // taken]
  places = places.reshape(parts)
  rest = [axis for axis in range(len(parts)) if axis not in chosen]
  return places.transpose(*rest, *chosen).reshape(-1, int(np.prod([parts[axis] for axis in chosen]))).tolist()


def _axes(groups: list[list[int]], mesh_shape: dict[str, int], slices: int) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ."""
  names, sizes = list(mesh_shape), list(mesh_shape.values())
  if slices > 1:
    names, sizes = [DCN, *names], [slices, sizes[0] // slices, *sizes[1:]]
  places = np.stack(np.unravel_index(np.asarray([n for group in groups for n in group]), sizes), axis=1)
  sections = np.split(places, np.cumsum([len(group) for group in groups])[:-1])
  differ = np.any([np.ptp(section, axis=0) > 0 for section in sections], axis=0)
  return tuple(name for name, crosses in zip(names, differ, strict=True) if crosses)


def host_callbacks(module: Module) -> list[str]:
  """Instructions that call back to the host, which stalls a TPU; what crosses slices is none."""
  transfers = ('outfeed', 'infeed', 'send', 'recv')
  target = lambda one: (re.search(r'custom_call_target="([^"]*)"', one.text) or [''])[0]
  return [one.name for one, _, _ in module.runs()
          if (one.opcode in transfers and 'xla_megascale_runtime' not in one.text)
          or (one.opcode == 'custom-call' and _CALLBACKS.search(target(one)))]
