"""Plans as text."""

import collections
import math
from typing import Any


def as_text(report: dict[str, Any]) -> str:
  """The plan of a run, for people: of the best mesh all, of the others a line."""
  best, *others = report['training']
  lines = [f'{best["topology"]}, {best["chips"]} chips, mesh {_mesh(best)}, {best["batch_size"]} rows of '
           f'{best["shapes"]["L"]} tokens and {best["shapes"]["M"]} alone, {best["shapes"]["E"]} spans a row',
           *_memory(best['memory'], best['fits'])]
  if best['fits']:
    lines += [*_step(best, report.get('epoch')), *_crossing(best)]
  if others:
    lines += ['', 'Meshes (data, fsdp, model), the fastest first:', *map(_line, report['training'])]
  for name, found in report.get('inference', {}).items():
    lines += ['', f'{name}, on one device:', *_memory(found['memory'], found['fits'])]
    if found['fits']:
      lines.append(f'  at least {_time(found["seconds"])}, bound by {found["bound"]}: {found["flops"]:.3g} operations, '
                   f'{_size(found["traffic"])} of memory traffic')
  return '\n'.join(lines)


def _mesh(report: dict[str, Any]) -> str:
  return ' x '.join(f'{name} {size}' for name, size in report['mesh'].items())


def _size(n: float) -> str:
  power = min(int(math.log10(max(n, 1))) // 3, 3)
  return f'{n / 1000**power:,.{2 * bool(power)}f} {("B", "KB", "MB", "GB")[power]}'


def _time(seconds: float) -> str:
  return f'{1000 * seconds:,.2f} ms'


def _memory(memory: dict[str, int], fits: bool) -> list[str]:
  parts = ', '.join(f'{name} {_size(size)}' for name, size in memory.items() if name not in ('total', 'capacity') and size)
  left = memory['capacity'] - memory['total']
  verdict = f'fits, {_size(left)} to spare' if fits else f'does NOT fit, by {_size(-left)}'
  return [f'  memory of a device: {_size(memory["total"])} of {_size(memory["capacity"])}: {verdict} ({parts})']


def _step(report: dict[str, Any], epoch: dict[str, Any] | None) -> list[str]:
  line, flops = report['roofline'], report['flops']
  links = ', '.join(f'{name} {_time(seconds)}' for name, seconds in line['links'].items()) or 'none'
  lines = [
      f'  a step at the published peaks: {_time(report["seconds"])}, bound by {report["bound"]} (arithmetic '
      f'{_time(line["arithmetic"])}, memory {_time(line["memory"])}, links: {links})',
      f'  {report["tokens_per_second"]:,.0f} tokens and {report["spans_per_second"]:,.0f} spans a second at most; MFU at most '
      f'{report["mfu"]:.0%} ({flops["products"]:.3g} operations a step, {flops["useful"]:.3g} of them useful)']
  if epoch:
    cost = '' if epoch['dollars'] is None else f', {epoch["dollars"]:,.2f} dollars'
    lines.append(f'  an epoch of {epoch["targets"]:,} targets: at least {epoch["hours"]:.2f} hours{cost}')
  if report['callbacks']:
    lines.append(f'  calls the host: {", ".join(report["callbacks"])}')
  return lines


def _crossing(report: dict[str, Any]) -> list[str]:
  sums: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
  for one in report['collectives']:
    key = '+'.join(one['axes']) or 'one device', one['kind']
    sums[key][0] += one['times']
    sums[key][1] += one['sent']
  return [f'  over {axes}: {times:,.0f} {kind}, {_size(sent)} sent by each device'
          for (axes, kind), (times, sent) in sorted(sums.items(), key=lambda each: -each[1][1])]


def _line(report: dict[str, Any]) -> str:
  sizes = ', '.join(map(str, report['mesh'].values()))
  said = f'{_time(report["seconds"])}, bound by {report["bound"]}' if report['fits'] else 'does not fit'
  return f'  ({sizes}): {said}, {_size(report["memory"]["total"])} of memory'
