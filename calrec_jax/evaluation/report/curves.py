"""Curves of training: read from TensorBoard's events and from SASRec's record."""

import math
import pathlib
import struct
from collections.abc import Mapping

from calrec_jax.html_page.charts import Points

TRAIN = ('loss', 'nig', 'ut', 'tt')  # of what a step writes, these are shown


def read_events(folder: pathlib.Path) -> dict[str, Points]:
  """{tag: [(step, value), ...]} of the scalars in a folder's events files, steps in order; a later file wins.

  A file whose last record is cut off, as a killed run leaves it, is read up to there. Raises ImportError without tensorboard.
  """
  from tensorboard.compat.proto.event_pb2 import Event  # plain protobuf: TensorFlow is not loaded
  found: dict[str, dict[int, float]] = {}
  for path in sorted(folder.glob('events.out.tfevents.*')):
    for record in _records(path.read_bytes()):
      try:
        event = Event.FromString(record)
      except Exception:  # protobuf's DecodeError; what follows a broken record cannot be trusted
        break
      for value in event.summary.value:
        number = _number(value)
        if number is not None and math.isfinite(number):
          found.setdefault(value.tag, {})[event.step] = number
  return {tag: sorted(by_step.items()) for tag, by_step in found.items()}


def _records(content: bytes) -> list[bytes]:
  """The whole records of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
  records, place = [], 0
  while place + 12 <= len(content):
    length = struct.unpack_from('<Q', content, place)[0]
    if place + 12 + length > len(content):
      break
    records.append(content[place + 12:place + 12 + length])
    place += 16 + length
  return records


def _number(value: object) -> float | None:
  """A scalar of a summary, as the old or the new writers store it; None if it is something else."""
  if value.HasField('simple_value'):
    return value.simple_value
  tensor = value.tensor
  if not value.HasField('tensor') or tensor.tensor_shape.dim:
    return None
  kind = {1: ('<f', 'float_val'), 2: ('<d', 'double_val'), 3: ('<i', 'int_val'), 9: ('<q', 'int64_val')}.get(tensor.dtype)
  if kind and len(tensor.tensor_content) == struct.calcsize(kind[0]):
    return float(struct.unpack(kind[0], tensor.tensor_content)[0])
  values = getattr(tensor, kind[1]) if kind else ()
  return float(values[0]) if len(values) == 1 else None


def training_curves(tags: Mapping[str, Points]) -> dict[str, Points]:
  """Those of a training run that are worth a look: the losses, and every validation metric."""
  wanted = [f'train/{name}' for name in TRAIN] + sorted(tag for tag in tags if tag.startswith('validation/'))
  return {tag: tags[tag] for tag in wanted if tag in tags}


def epoch_curves(epochs: object) -> dict[str, Points]:
  """SASRec's epochs as its run.json has them; {} for anything else."""
  if not isinstance(epochs, list) or not all(isinstance(epoch, dict) for epoch in epochs):
    return {}
  curves: dict[str, Points] = {}
  for name in ('loss', 'recall@10', 'ndcg@10', 'mrr'):
    points = [(number, epoch[name]) for number, epoch in enumerate(epochs)
              if type(epoch.get(name)) in (int, float) and math.isfinite(epoch[name])]
    if points:
      curves[f'train/{name}' if name == 'loss' else f'validation/{name}'] = points
  return curves
