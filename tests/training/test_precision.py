"""bfloat16 computation, with float32 softmax, pooling and losses, trains as float32 does."""

import dataclasses

import numpy as np
import tiny

from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.trainer import Schedule


def losses(store, folder, **decoder) -> np.ndarray:
  """Loss of each of 50 steps."""
  tiny.train(store, folder, train_steps=50, decoder=dataclasses.replace(tiny.DECODER, **decoder),
             optimizer=Optimizer(warmup_steps=5, learning_rate=3e-3),
             schedule=Schedule(log_every=1, eval_every=0, save_every=50))
  found = tiny.scalars(folder, 'train/')
  return np.asarray([found['train/loss', step] for step in range(1, 51)])


def test_losses_in_bfloat16_stay_within_a_hundredth(tiny_store, tmp_path):
  exact = losses(tiny_store, tmp_path / 'float32', dtype='float32')
  rough = losses(tiny_store, tmp_path / 'bfloat16', dtype='bfloat16')
  assert exact[-1] < 0.7 * exact[0]
  assert np.abs(rough / exact - 1).max() < 0.01
  assert np.abs(rough - exact).max() > 0  # it was another computation
