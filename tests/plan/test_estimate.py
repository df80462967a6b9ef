"""Roofline times against sums by hand, and the meshes that are tried."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DECODER, OBJECTIVE

from calrec_jax.errors import UserError
from calrec_jax.plan import estimate, meshes
from calrec_jax.plan.chips import CHIPS
from calrec_jax.plan.programs import Training
from calrec_jax.plan.traffic import Collective
from calrec_jax.text.batches import RowOptions
from calrec_jax.training.optimizer import Optimizer

V5E, V5P, V4 = CHIPS['v5e'], CHIPS['v5p'], CHIPS['v4']


def coords(*shape):
  """Where the chips of a slice lie, in the order of a mesh of the same shape."""
  return np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), axis=-1)


def test_an_axis_has_the_links_of_the_dimensions_it_lies_along():
  names = ('data', 'fsdp')
  assert estimate.axis_rates(V5E, coords(4, 8), names) == {'data': V5E.link_rate, 'fsdp': V5E.link_rate}
  assert estimate.axis_rates(V5E, coords(16, 16), names) == {'data': 2 * V5E.link_rate, 'fsdp': 2 * V5E.link_rate}  # rings
  flat = coords(16, 16).reshape(256, 1, 2)
  assert estimate.axis_rates(V5E, flat, names) == {'data': 4 * V5E.link_rate, 'fsdp': V5E.link_rate}
  assert estimate.axis_rates(V5P, coords(4, 4, 4), 'xyz') == dict.fromkeys('xyz', 2 * V5P.link_rate)


def test_slices_are_joined_by_the_network():
  two = np.concatenate([coords(2, 4)] * 2)
  rates = estimate.axis_rates(V5E, two, ('data', 'fsdp'), slices=2)
  assert rates == {'data': V5E.link_rate, 'fsdp': V5E.link_rate, 'dcn': V5E.network_rate}
  with pytest.raises(UserError, match='no published speed'):
    estimate.axis_rates(V4, np.concatenate([coords(2, 2, 1)] * 2), ('data', 'fsdp', 'model'), slices=2)


def collective(kind, *axes, size=8, times=1.0, group=4):
  return Collective(kind, axes, group, size, times, (), '')


def test_what_each_device_sends_in_a_ring():
  kinds = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all')
  assert {kind: collective(kind, 'data', size=1000).sent for kind in kinds} == {
      'all-gather': 750, 'reduce-scatter': 750, 'all-reduce': 1500, 'all-to-all': 750}
  assert collective('collective-permute', 'data', size=1000, times=3).sent == 3000


def test_a_step_lasts_as_long_as_its_slowest_resource():
  crossing = [collective('all-gather', 'data', size=4e6, times=2), collective('all-reduce', 'data', 'fsdp', size=1e6)]
  found = estimate.roofline(V5E, flops=197e9, traffic=819e6, collectives=crossing, rates={'data': 1e9, 'fsdp': 1e6})
  assert found.arithmetic == pytest.approx(1e-3) and found.memory == pytest.approx(1e-3)
  assert found.links == {'data': pytest.approx(6e-3), 'data+fsdp': pytest.approx(1.5)}
  assert found.seconds == pytest.approx(1.506) and found.bound == 'links'
  assert estimate.roofline(V4, flops=1e12, traffic=0, collectives=[], rates={}).bound == 'arithmetic'


def training(batch_size):
  return Training(DECODER, OBJECTIVE, RowOptions(), Optimizer(), {'inputs': 48, 'targets': 16}, batch_size, 1, 512, ())


@settings(deadline=None)
@given(devices=st.integers(1, 64), batch_size=st.integers(1, 64), slices=st.sampled_from([1, 2]))
def test_meshes_make_up_the_devices_and_divide_the_batch(devices, batch_size, slices):
  tried = list(meshes.factorizations(devices, training(batch_size), slices))
  for mesh in tried:
    assert mesh.data * mesh.fsdp * mesh.model == devices and batch_size % (mesh.data * mesh.fsdp) == 0
    assert mesh.data % slices == 0 and DECODER.n_heads % mesh.model == 0 and DECODER.embed_dim % mesh.fsdp == 0
  assert len(set(tried)) == len(tried)
  if math.gcd(devices, batch_size) == devices and slices == 1:
    assert (devices, 1, 1) in {(mesh.data, mesh.fsdp, mesh.model) for mesh in tried}


def test_a_small_model_lies_whole_on_each_device_and_a_large_one_does_not():
  chip = lambda memory: dataclasses.replace(V5E, hbm=memory)
  best = lambda memory: meshes.ranked(8, training(64), 100_000, chip(memory))[0].mesh  # 1.2 MB with the optimizer
  assert best(10_000_000).data == 8 and best(800_000).data <= 2
