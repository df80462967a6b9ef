"""Sampling speed: users a second, 32 texts of 32 new tokens each, against `transformers` `generate`.

Both sides have the weights of one checkpoint (such as SmolLM2-135M), float32, on this machine's CPU, and read the same
prefixes: the last 512 tokens of real histories. The peer samples with `num_return_sequences`, SDPA, `inference_mode`,
`top_k=0`, `top_p=1`. One user at a time, and several a batch (the peer's best of those given, one a batch among them). The
temperature is the method's, 0.5; memory comes in huge pages, for both sides. First the log-probability of every token that we
sampled, under the peer; where one differs by more than 1e-3 nothing counts. Then the speed, and memory beyond the weights, from
the compiled programs, of 32 samples over one. The last line is JSON; `ratio` is for one user at a time, `batch_ratio` for
several.

  python benchmarks/infer_speed.py --checkpoint SMOLLM2 --data HISTORIES_FOLDER [--quick]

`calrec import --from SmolLM2-135M-Instruct.Q4_1.gguf --out SMOLLM2` makes the checkpoint. --quick: one user at a time only.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_peer

from calrec_jax.data import histories
from calrec_jax.inference import loading, prefixes, sampling
from calrec_jax.models import decoding
from calrec_jax.text.item_tokens import load_item_tokens

PREFIX, SAMPLES, NEW = 512, 32, 32
TEMPERATURE = 0.5


def real_prefixes(loaded: loading.Loaded, folder: str, n_users: int) -> np.ndarray:
  """The last 512 tokens of the first histories that have so many: int32 [U, 512]."""
  data = histories.load(folder)
  made = prefixes.make_prefixes(loaded.vocabulary, load_item_tokens(folder, data, loaded.template, loaded.vocabulary),
                                max_item_tokens=64, max_length=10**9)
  rows = (made.tokens(data.history(user)) for user in np.flatnonzero(np.diff(data.offsets) > 8))
  return np.stack([row[-PREFIX:] for row, _ in zip((row for row in rows if len(row) >= PREFIX), range(n_users), strict=False)])


class Ours:
  """The sampler; no text ends, as both sides write exactly 32 tokens."""

  def __init__(self, loaded: loading.Loaded):
    self.decoder, self.params = loaded.decoder, decoding.by_layer(loaded.params)
    self.end = loaded.decoder.config.vocab_size - 1  # a token that a text has hardly ever
    self.prefill = jax.jit(lambda params, tokens_UP, lengths_U: decoding.prefill(
        self.decoder, params, tokens_UP, lengths_U, bos=False))

  def prefix(self, tokens_UP: np.ndarray) -> decoding.Prefix:
    return self.prefill(self.params, tokens_UP, np.full(len(tokens_UP), PREFIX, np.int32))

  def __call__(self, tokens_UP: np.ndarray, n_samples: int = SAMPLES) -> sampling.Samples:
    keys = np.arange(2 * len(tokens_UP), dtype=np.uint32).reshape(-1, 2)
    return sampling.sample(self.decoder, self.params, self.prefix(tokens_UP), keys, n_samples=n_samples,
                           temperature=TEMPERATURE, max_new_tokens=NEW, eos_id=self.end)


class Theirs:

  def __init__(self, loaded: loading.Loaded):
    self.model = torch_peer.model(loaded.decoder.config, jax.tree.map(np.asarray, loaded.params)).eval()

  def __call__(self, tokens_UP: np.ndarray) -> None:
    tokens = torch.from_numpy(tokens_UP.astype(np.int64))
    with torch.inference_mode():
      found = self.model.generate(
          tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
          num_return_sequences=SAMPLES, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    assert found.shape == (len(tokens) * SAMPLES, PREFIX + NEW), found.shape

  def logprobs(self, prefix_P: np.ndarray, texts_NT: np.ndarray) -> np.ndarray:
    """float64 [N, T]: of each token given the prefix and those before it, in full passes."""
    rows = torch.from_numpy(np.concatenate([np.tile(prefix_P, (len(texts_NT), 1)), texts_NT], axis=1).astype(np.int64))
    with torch.inference_mode():
      logits = self.model(rows, logits_to_keep=NEW + 1).logits[:, :-1].double()
    return torch.gather(torch.log_softmax(logits, -1), 2, rows[:, PREFIX:, None])[..., 0].numpy()


def best(call: Callable[[], object], repeats: int) -> float:
  """Seconds of the fastest of some calls."""
  times = []
  for _ in range(repeats):
    begun = time.perf_counter()
    call()
    times.append(time.perf_counter() - begun)
  return min(times)


def token_difference(ours: Ours, theirs: Theirs, prefix_P: np.ndarray) -> float:
  """The largest difference of a sampled token's log-probability."""
  samples = ours(prefix_P[None])
  return float(np.abs(samples.logprobs_UNT[0] - theirs.logprobs(prefix_P, samples.tokens_UNT[0])).max())


def peak_bytes(ours: Ours, n_samples: int) -> int:
  """Caches and temporaries of one user at prefix 512 when all samples differ; no weights. From the compiled programs."""
  shape = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  params, tokens = shape(ours.params), jax.ShapeDtypeStruct((1, PREFIX), jnp.int32)
  lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
  prefill = ours.prefill.lower(params, tokens, lengths).compile().memory_analysis()
  prefix = jax.eval_shape(ours.prefill, params, tokens, lengths)
  suffix = jax.eval_shape(lambda: decoding.empty_suffix(ours.decoder, n_samples, NEW - 1))
  of = shape(decoding.branches(np.zeros(n_samples, np.int64), 1, n_samples))
  step = sampling._advance.lower(ours.decoder, params, jax.ShapeDtypeStruct((n_samples,), jnp.int32), prefix, suffix, of,
                                 jax.ShapeDtypeStruct((), jnp.int32)).compile().memory_analysis()
  held = size(prefix) + size(suffix)
  V, D = ours.decoder.config.vocab_size, ours.decoder.config.embed_dim
  draw = sampling._draw.lower(
      ours.decoder, params, jax.ShapeDtypeStruct((1, 2), jnp.uint32), jax.ShapeDtypeStruct((V,), bool), n_samples, TEMPERATURE,
      1.0, jax.ShapeDtypeStruct((n_samples, D), jnp.float32), jax.ShapeDtypeStruct((1, n_samples), jnp.int32),
      jax.ShapeDtypeStruct((), jnp.int32)).compile().memory_analysis()
  return max(size(prefix) + prefill.temp_size_in_bytes, held + step.temp_size_in_bytes, held + draw.temp_size_in_bytes)


def main() -> None:
  if 'GLIBC_TUNABLES' not in os.environ:  # is read when a process starts
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.argv])
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--batch_sizes', type=int, nargs='+', default=[2, 4], help='users a batch of the peer')
  parser.add_argument('--our_batch_sizes', type=int, nargs='+', default=[4, 8], help='and of ours')
  parser.add_argument('--repeats', type=int, default=2)
  parser.add_argument('--quick', action='store_true')
  options = parser.parse_args()
  loaded = loading.load(options.checkpoint, dtype='float32')
  tokens_UP = real_prefixes(loaded, options.data, 8)
  ours, theirs = Ours(loaded), Theirs(loaded)
  n_users = 4  # one after the other
  result = {'name': 'infer_speed', 'prefix': PREFIX, 'samples': SAMPLES, 'new_tokens': NEW, 'temperature': TEMPERATURE}
  difference = token_difference(ours, theirs, tokens_UP[0])
  print(f'largest difference of a token\'s log-probability: {difference:.1e}')
  if difference > 1e-3:
    raise SystemExit('The two sides differ: nothing counts.')
  one_by_one = lambda: [ours(tokens_UP[user:user + 1]) for user in range(n_users)]
  one_by_one()  # compiles
  ours_one = best(one_by_one, options.repeats) / n_users
  theirs_one = best(lambda: theirs(tokens_UP[:1]), options.repeats)
  print(f'one user at a time: {ours_one:.2f} s a user, the peer {theirs_one:.2f} s: {theirs_one / ours_one:.1f} x')
  result |= {'ratio': theirs_one / ours_one, 'seconds_a_user': ours_one, 'peer_seconds_a_user': theirs_one,
             'logprob_difference': difference}
  if not options.quick:
    ours_many, theirs_many = {}, {1: theirs_one}
    for size in options.our_batch_sizes:
      ours(tokens_UP[:size])
      ours_many[size] = best(lambda size=size: ours(tokens_UP[:size]), options.repeats) / size
    for size in options.batch_sizes:
      theirs_many[size] = best(lambda size=size: theirs(tokens_UP[:size]), 1) / size
    print('seconds a user by users a batch: ours', ours_many, 'the peer', theirs_many)
    result |= {'batch_ratio': min(theirs_many.values()) / min(ours_many.values()),
               'ours_by_batch': ours_many, 'peer_by_batch': theirs_many}
  one, many = peak_bytes(ours, 1), peak_bytes(ours, SAMPLES)
  print(f'memory beyond the weights: {many / 1e6:.0f} MB for {SAMPLES} samples, {one / 1e6:.0f} MB for one')
  print(json.dumps(result | {'memory_ratio': many / one}))


if __name__ == '__main__':
  main()
