"""What crosses chips: the collectives of a compiled program, with their bytes."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4, 'f32': 4,
          's64': 8, 'u64': 8, 'f64': 8}
_LINE = re.compile(rf'= (?P<shapes>.*?) (?P<kind>{"|".join(KINDS)})(?:-start)?\((?P<rest>.*)')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program, as often as its loop runs it: that is not counted.

  Attributes:
    kind: one of `KINDS`.
    shapes: (dtype, shape) of what each device holds after it.
    source: the JAX operation it comes from, as the compiler says.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  source: str

  @property
  def bytes(self) -> int:
    """Of what each device holds after it."""
    return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in self.shapes)


def collectives(compiled_text: str) -> Iterator[Collective]:
  """The collectives in a program's text (`compiled.as_text()`).

  One that runs beside other work stands there several times, in parts, all with its channel: it is given once.
  """
  channels = set()
  for line in compiled_text.splitlines():
    if not (match := _LINE.search(line)):
      continue
    channel = re.search(r'channel_id=(\d+)', line)
    if channel and channel[1] in channels:
      continue
    channels |= {channel[1]} if channel else set()
    shapes = tuple((dtype, tuple(int(size) for size in sizes.split(',') if size))
                   for dtype, sizes in _SHAPE.findall(match['shapes']) if dtype in _BYTES)
    if '-start(' in line and match['kind'] != 'all-reduce':  # its tuple holds the operands too, a permutation's two handles
      shapes = shapes[:-2] if match['kind'] == 'collective-permute' else shapes
      shapes = shapes[len(shapes) // 2:]
    source = re.search(r'op_name="([^"]*)"', match['rest'])
    yield Collective(match['kind'], shapes, source[1] if source else '')
