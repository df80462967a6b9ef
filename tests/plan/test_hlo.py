"""A compiled program's text, read: loops are counted, collectives have their mesh axis, traffic is what arrays weigh."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from calrec_jax.plan import hlo, topology, traffic
from calrec_jax.training.partitioning import MeshShape

MESH = {'data': 2, 'fsdp': 2, 'model': 2}


@functools.cache
def mesh():
  return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 3)


def module(function, *operands):
  """The program of a function of arrays with shardings, (shape, partition spec)."""
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), spec)) for shape, spec in operands]
  return hlo.parse(jax.jit(function).lower(*shapes).compile().as_text())


def only(found, kind):
  (one,) = [each for each in found if each.kind == kind]
  return one


AXES = [('data',), ('fsdp',), ('model',), ('data', 'fsdp'), ('data', 'model'), ('fsdp', 'model'), ('data', 'fsdp', 'model')]


@pytest.mark.parametrize('axes', AXES)
def test_a_sum_crosses_the_axes_that_it_is_over(axes):
  summed = module(lambda x: jnp.sum(x, axis=0), ((8, 64), P(axes)))
  one = only(traffic.collectives(summed, MESH), 'all-reduce')
  assert one.axes == axes and one.group == 2**len(axes) and one.times == 1 and one.bytes == 64 * 4
  assert one.sent == 2 * (one.group - 1) / one.group * one.bytes


def test_slices_have_an_axis_of_their_own():
  summed = module(lambda x: jnp.sum(x, axis=0), ((8, 64), P('data')))
  assert only(traffic.collectives(summed, MESH, slices=2), 'all-reduce').axes == ('dcn',)


def test_a_gather_brings_the_whole_array():
  gathered = module(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), P())) * 2, ((8, 64), P('fsdp')))
  one = only(traffic.collectives(gathered, MESH), 'all-gather')
  assert one.axes == ('fsdp',) and one.bytes == 8 * 64 * 4


def looped(x_SD, w_NDD):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_SD, w_NDD)[0]


def turns(program, trips=1):
  """How often the program's products run."""
  return {times for one, _, times in program.runs(trips)
          if one.source.endswith('dot_general') and one.opcode in ('dot', 'fusion', 'custom-call')}


def test_what_a_loop_runs_counts_as_often_as_it_runs():
  program = module(looped, ((4, 64), P()), ((7, 64, 64), P(None, 'model')))
  assert {one.times for one in traffic.collectives(program, MESH)} == {7}
  assert turns(module(looped, ((4, 64), P()), ((7, 64, 64), P()))) == {7}


COUNTED = """HloModule loop

%added (a: u32[], b: u32[]) -> u32[] {{
  %a = u32[] parameter(0)
  %b = u32[] parameter(1)
  ROOT %sum = u32[] add(%a, %b)
}}

%less (p: (f32[4], u32[])) -> pred[] {{
  %p = (f32[4]{{0}}, u32[]) parameter(0)
  %bound = u32[] constant(7)
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %compare = pred[] compare(%i, %bound), direction=LT
}}

%body (q: (f32[4], u32[])) -> (f32[4], u32[]) {{
  %q = (f32[4]{{0}}, u32[]) parameter(0)
  %step = u32[] constant({step})
  %x = f32[4]{{0}} get-tuple-element(%q), index=0
  %j = u32[] get-tuple-element(%q), index=1
  %y = f32[4]{{0}} tanh(%x)
  %next = u32[] {next}
  ROOT %both = (f32[4]{{0}}, u32[]) tuple(%y, %next)
}}

ENTRY %main (start: (f32[4], u32[])) -> (f32[4], u32[]) {{
  %start = (f32[4]{{0}}, u32[]) parameter(0)
  ROOT %loop = (f32[4]{{0}}, u32[]) while(%start), condition=%less, body=%body
}}
"""


@pytest.mark.parametrize('step, following, trips', [
    (1, 'add(%j, %step)', 7), (2, 'add(%j, %step)', 4), (2, 'fusion(%j, %step), kind=kLoop, calls=%added', 4),
    (3, 'add(%step, %j)', 3), (2, 'multiply(%j, %step)', 7)])
def test_a_loop_may_count_in_larger_steps(step, following, trips):
  program = hlo.parse(COUNTED.format(step=step, next=following))
  assert [times for one, _, times in program.runs() if one.opcode == 'tanh'] == [trips]


def test_weights_that_go_round_a_ring_go_round_once():
  """The TPU compiler sends shards of weights on while it multiplies, in a loop that it unrolls."""
  pytest.importorskip('libtpu')
  topology.prepare()
  ring = MeshShape(1, 8, 1).build(topology.devices(topology.parse('v5e:2x4')))

  def layer(x_BLD, weights):
    gate_DF, up_DF, down_FD = weights
    return (jax.nn.silu(x_BLD @ gate_DF) * (x_BLD @ up_DF)) @ down_FD, None
  array = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(ring, P(*spec)))
  weights = (*[array((5, 576, 1536), None, 'fsdp')] * 2, array((5, 1536, 576), None, None, 'fsdp'))
  with jax.default_matmul_precision('default'):
    compiled = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(array((64, 512, 576), 'fsdp'), weights).compile()
  sent = traffic.collectives(hlo.parse(compiled.as_text()), dict(ring.shape))
  share = sum(one.times * one.bytes for one in sent if one.kind == 'collective-permute') / (5 * 3 * 576 * 1536 * 2)
  assert 7 / 8 <= share <= 9 / 8  # of all eight parts a device has one, and at the end of the loop two are sent in vain


def test_a_loop_of_unknown_length_counts_as_told():
  def until(x, n):
    return jax.lax.while_loop(lambda c: c[1] < n, lambda c: (jnp.tanh(c[0] @ c[0]), c[1] + 1), (x, jnp.zeros((), n.dtype)))[0]
  program = module(until, ((64, 64), P()), ((), P()))
  for trips in (1, 5):
    assert turns(program, trips) == {trips}
  assert traffic.memory_traffic(program, 50) > 9 * traffic.memory_traffic(program, 5)


def test_a_slice_of_a_stack_is_read_once_a_turn():
  """All of 40 matrices are read once over the whole loop, not all of them in each turn."""
  program = module(looped, ((4, 256), P()), ((40, 256, 256), P()))
  weights = 40 * 256 * 256 * 4
  assert weights <= traffic.memory_traffic(program) < 4 * weights


def test_an_addition_reads_two_and_writes_one():
  program = module(lambda x, y: x + y, ((512, 512), P()), ((512, 512), P()))
  assert traffic.memory_traffic(program) == 3 * 512 * 512 * 4


def test_callbacks_are_found():
  def told(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
  assert traffic.host_callbacks(module(told, ((4,), P())))
  assert not traffic.host_callbacks(module(jnp.sin, ((4,), P())))


def test_lines_of_collectives_are_read():
  """One that runs beside other work stands there in parts: as two with one channel, or as start and done."""
  first, second, third, fourth = traffic.collectives(hlo.parse('''
ENTRY %main (x: f32[1,16]) -> f32[8] {
  %a = f32[8,16]{1,0} all-gather(%x), channel_id=1, metadata={op_name="jit(step)/gather"}
  %b = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%y, %z), to_apply=%add
  %c = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  %d = f32[8]{0} all-gather-done(%c)
  %e = f32[8]{0} add(%c, %d)
  %g = (bf16[4,2]{1,0}, bf16[4,2]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=2
  ROOT %f = f32[8,16]{1,0} all-gather(%y), channel_id=1, metadata={op_name="jit(step)/gather"}
}
'''), MESH)
  assert (first.kind, first.bytes, first.source) == ('all-gather', 512, 'jit(step)/gather')
  assert (second.kind, second.bytes) == ('all-reduce', 28)
  assert third.arrays == (('f32', (8,)),)
  assert (fourth.kind, fourth.arrays) == ('collective-permute', (('bf16', (4, 2)),))
