"""What crosses chips in a training step, compiled for TPU topologies on a machine without a TPU: the table of docs/scaling.md.

Rows a device are fixed, so the batch grows with the devices. Each collective is counted as often as its loop runs it. There is
no peer: the ratio is bytes that the largest of the topologies moves for embeddings over what `O(global spans x D)` says.

  python benchmarks/collectives.py [--quick] [--topology v5e:2x4:8,1,1 ...]      (pip install 'jax[tpu]' first)

A topology is NAME:SHAPE:DATA,FSDP,MODEL; each takes minutes. --quick: 8 devices only. Prints one JSON object as its last line.
"""

import argparse
import collections
import dataclasses
import json

import gin
import jax
import numpy as np

from calrec_jax import configurables
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import TwoTower
from calrec_jax.plan import hlo, programs, topology, traffic
from calrec_jax.text.rows import Shapes
from calrec_jax.training import partitioning
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.partitioning import MeshShape
from calrec_jax.training.train_step import make_train_step, new_state

TOPOLOGIES = ('v5e:2x4:8,1,1', 'v5e:2x4:1,8,1', 'v5e:8x8:64,1,1', 'v5e:16x16:256,1,1', 'v5p:8x8x16:1024,1,1')
WHAT = ('embeddings', 'parameters', 'gradients', 'activations', 'rest')


def what(one: traffic.Collective, shapes: Shapes, width: int) -> str:
  """What a collective moves, by where the compiler says it comes from."""
  if one.bytes < 4096:
    return 'rest'
  of_spans = {shapes.B * shapes.E, shapes.B * shapes.S}
  if '/layers/' not in one.source and any(
      shape[-1:] == (width,) and int(np.prod(shape[:-1])) in of_spans for _, shape in one.arrays):
    return 'embeddings'
  if one.kind == 'all-to-all' or any(len(shape) > 2 and shape[-1] == width and {shapes.L, shapes.M} & set(shape)
                                     for _, shape in one.arrays):
    return 'activations'  # embedded tokens, where the embedding's width lies over fsdp
  return 'gradients' if one.kind in ('all-reduce', 'reduce-scatter') else 'parameters'


def compiled_collectives(config: DecoderConfig, shapes: Shapes, mesh: jax.sharding.Mesh) -> list[traffic.Collective]:
  """Those of a training step."""
  model, optimizer = TwoTower(Decoder(config), Objective()), Optimizer().build(1000)
  make_state, shardings = new_state(model, optimizer, shapes, 0, mesh)
  rows = partitioning.batch_sharding(mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.features().items()}
  state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(make_state), shardings)
  compiled = make_train_step(model, optimizer, mesh, shardings).lower(state, batch).compile()
  return traffic.collectives(hlo.parse(compiled.as_text()), dict(mesh.shape))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='gin/models/smollm2_135m.gin')
  parser.add_argument('--vocab_size', type=int, default=49_152, help="where the model's file leaves it to the vocabulary")
  parser.add_argument('--topology', action='append', default=[])
  parser.add_argument('--rows', type=int, default=8, help='of a device')
  parser.add_argument('--quick', action='store_true', help='8 devices only')
  parser.add_argument('--list', action='store_true', help='every collective')
  options = parser.parse_args()
  topology.prepare()
  configurables.parse([options.model], [], [])
  config = gin.get_configurable('calrec.decoder')()
  if config.vocab_size is None:
    config = dataclasses.replace(config, vocab_size=options.vocab_size)
  config = programs.for_tpu(config)
  print('| topology | mesh | ' + ' | '.join(f'{name}, MB' for name in WHAT) + ' |\n|---|---|' + '---|' * len(WHAT))
  ratio = None
  for wanted in options.topology or (TOPOLOGIES[:2] if options.quick else TOPOLOGIES):
    name, _, axes = wanted.rpartition(':')
    mesh = MeshShape(*map(int, axes.split(','))).build(topology.devices(topology.parse(name)))
    B = options.rows * mesh.shape['data'] * mesh.shape['fsdp']
    shapes = Shapes(B=B, L=512, M=256, E=16, S=16)
    found = compiled_collectives(config, shapes, mesh)
    moved = collections.Counter()
    for one in found:
      moved[what(one, shapes, config.embed_dim)] += one.times * one.bytes
      if options.list:
        print(one.times, one.kind, one.bytes, one.arrays[:3], one.source[-100:])
    print(f'| {name} | {axes} | ' + ' | '.join(f'{moved[kind] / 1e6:,.2f}' for kind in WHAT) + ' |', flush=True)
    ratio = moved['embeddings'] / (B * (shapes.E + shapes.S) * config.embed_dim * 4)
  print(json.dumps({'name': 'collectives', 'peer': 'global spans and texts x D in float32', 'ratio': round(ratio, 3)}))


if __name__ == '__main__':
  main()
