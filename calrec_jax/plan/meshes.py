"""Which meshes a number of devices allows, and a first guess at which of them are fast: it needs no compiler."""

import dataclasses
from collections.abc import Iterator

from calrec_jax.plan.chips import Chip
from calrec_jax.plan.programs import Training
from calrec_jax.training.partitioning import MeshShape


def factorizations(devices: int, training: Training, slices: int = 1) -> Iterator[MeshShape]:
  """All meshes (data, fsdp, model) of so many devices that divide the batch, the embedding and the heads."""
  config = training.decoder
  for model in _divisors(devices):
    if config.n_heads % model or config.ff_dim % model:
      continue
    for fsdp in _divisors(devices // model):
      data = devices // model // fsdp
      if data % slices or config.embed_dim % fsdp or training.batch_size % (data * fsdp * training.microbatches):
        continue
      yield MeshShape(data, fsdp, model)


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


@dataclasses.dataclass(frozen=True)
class Guess:
  """Of one mesh: bytes of parameters and optimizer on a device, and seconds of what crosses chips."""

  mesh: MeshShape
  state: float
  links: float


def guess(mesh: MeshShape, training: Training, parameters: int, chip: Chip) -> Guess:
  """What a mesh costs, roughly.

  Gradients are summed over `data`; parameters are gathered twice over `fsdp` and their gradients scattered; each layer's
  activations are summed over `model` four times. An axis is taken to have one dimension of the torus.
  """
  config, shapes = training.decoder, training.shapes
  d, f, m = mesh.data, mesh.fsdp, mesh.model
  ring = lambda n: (n - 1) / n
  width = 2  # bytes of bfloat16
  activations = shapes.B / (d * f) * (shapes.L + shapes.M) * config.embed_dim * width
  sent = (2 * ring(d) * parameters * width / (f * m) + 3 * ring(f) * parameters * width / m
          + 2 * ring(m) * 4 * config.n_layers * activations)
  moments = 4 if training.optimizer.state_dtype == 'bfloat16' else 8
  stored = 2 if config.param_dtype == 'bfloat16' else 4
  return Guess(mesh, parameters * (stored + moments) / (f * m), sent / (2 * chip.link_rate))


def ranked(devices: int, training: Training, parameters: int, chip: Chip, slices: int = 1) -> list[Guess]:
  """Guesses of all meshes, the best first; those whose parameters and optimizer take more than half of the memory last."""
  guesses = [guess(mesh, training, parameters, chip) for mesh in factorizations(devices, training, slices)]
  return sorted(guesses, key=lambda each: (each.state > chip.hbm / 2, each.links, each.state))

