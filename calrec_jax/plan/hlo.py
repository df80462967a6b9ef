"""Compiled programs as XLA prints them: computations of instructions, and how often each instruction runs.

The text is that of `compiled.as_text()`: after all passes, with loops, fusions and memory spaces as the device has them.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8,
         'f64': 8}
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
_CALLS = re.compile(r'(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|'
                    r'called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array that an instruction gives: its type, its sizes, and whether it lies in the chip's own memory."""

  dtype: str
  shape: tuple[int, ...]
  on_chip: bool

  @property
  def bytes(self) -> int:
    return BYTES.get(self.dtype, 0) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str  # the operands, in brackets, and what follows them
  is_root: bool

  @property
  def called(self) -> list[str]:
    """Names of the computations that it runs."""
    return [name.strip().lstrip('%') for many, one in _CALLS.findall(self.text) for name in (many or one).split(',')]

  @property
  def source(self) -> str:
    """The JAX operation that it comes from, as the compiler says."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ''


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """All computations of a program, by name."""

  computations: dict[str, Computation]
  entry: str

  def runs(self, unknown_trips: int = 1) -> Iterator[tuple[Instruction, Computation, float]]:
    """(instruction, its computation, how often it runs), of all that are no part of a fusion.

    A loop whose length is not in the text counts `unknown_trips` times; of the branches of a choice each counts its share.
    """
    def walk(name: str, times: float) -> Iterator[tuple[Instruction, Computation, float]]:
      computation = self.computations[name]
      for one in computation.values():
        yield one, computation, times
        if one.opcode == 'while':
          body = re.search(r'body=%?([\w.\-]+)', one.text)[1]
          yield from walk(body, times * (self.trips(one) or unknown_trips))
        elif one.opcode in ('call', 'conditional', 'async-start'):
          branches = [called for called in one.called if called in self.computations]
          for called in branches:
            yield from walk(called, times / (len(branches) if one.opcode == 'conditional' else 1))
    return walk(self.entry, 1)

  def inside(self, fusion: Instruction) -> Iterator[Instruction]:
    """The instructions of a fusion, and of fusions in it; none, if it is something else."""
    for name in fusion.called if fusion.opcode == 'fusion' else ():
      for one in self.computations[name].values():
        yield one
        yield from self.inside(one)

  def trips(self, loop: Instruction) -> int | None:
    """How often a loop's body runs; None where it depends on data."""
    known = re.search(r'known_trip_count\W+n\W+(\d+)', loop.text)
    if known:
      return int(known[1])
    condition, body = (re.search(rf'{part}=%?([\w.\-]+)', loop.text)[1] for part in ('condition', 'body'))
    bound = self._bound(condition)
    return None if bound is None else -(-bound[0] // self._step(body, bound[1]))

  def _bound(self, name: str) -> tuple[int, int | None] | None:
    """(what a loop's counter, which begins at 0, is compared with, the counter's place in what the loop carries).

    None where it is not compared with a constant.
    """
    computation = self.computations[name]
    root = compared = _root(computation)
    if root.opcode == 'fusion':
      compared = _root(self.computations[root.called[0]])
    if compared.opcode != 'compare' or 'direction=LT' not in compared.text:
      return None
    known = [computation[operand] for operand in root.operands if operand in computation]
    values = [_constant(one) for one in known if one.opcode == 'constant']
    places = [int(found[1]) for one in known if (found := re.search(r'\bindex=(\d+)', one.text))]
    return (values[0], places[0] if places else None) if len(values) == 1 and values[0] else None

  def _step(self, name: str, place: int | None) -> int:
    """What a loop's body adds to its counter: the compiler unrolls some loops. 1 where that is not a constant."""
    outer = computation = self.computations[name]
    root = _root(computation)
    one = computation.get(root.operands[place]) if root.opcode == 'tuple' and place is not None else None
    given: dict[str, str] = {}
    if one is not None and one.opcode == 'fusion':
      computation = self.computations[one.called[0]]
      given = {each.name: one.operands[int(re.match(r'\((\d+)\)', each.text)[1])]
               for each in computation.values() if each.opcode == 'parameter'}
      one = _root(computation)
    if one is None or one.opcode != 'add':
      return 1
    parts = [outer.get(given[operand]) if operand in given else computation.get(operand) for operand in one.operands]
    return next((value for part in parts if part is not None and part.opcode == 'constant' and (value := _constant(part))), 1)


def _root(computation: Computation) -> Instruction:
  return next(one for one in computation.values() if one.is_root)


def _constant(one: Instruction) -> int | None:
  found = re.match(r'\((\d+)\)', one.text)
  return int(found[1]) if found else None


def parse(text: str) -> Module:
  """Reads a program."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      current = computations.setdefault(found['name'], {})
      entry = found['name'] if found['entry'] else entry
    elif line == '}':  # lines of a kernel's settings may begin with one
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current[found['name']] = _instruction(found['name'], found['rest'], bool(found['root']))
  return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
  shapes, rest = _split_shape(rest)
  opcode, _, rest = rest.partition('(')
  end = _closing(rest)
  operands, text = rest[:end], rest[end + 1:]
  arrays = tuple(Array(dtype, tuple(map(int, filter(None, sizes.split(',')))), 'S(1)' in (layout or ''))
                 for dtype, sizes, layout in _ARRAY.findall(shapes))
  names = tuple(re.findall(r'%([\w.\-]+)', operands))
  return Instruction(name, opcode.strip(), arrays, names, f'({operands}){text}', is_root)


def _split_shape(rest: str) -> tuple[str, str]:
  """The type of an instruction, which may be a tuple, and what follows it."""
  if not rest.startswith('('):
    shape, _, rest = rest.partition(' ')
    return shape, rest
  end = _closing(rest[1:]) + 1
  return rest[:end + 1], rest[end + 2:]


def _closing(text: str) -> int:
  """Where the bracket closes that was opened just before the text."""
  depth = 1
  for place, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      return place
  raise ValueError(f'no closing bracket in {text[:80]!r}')
