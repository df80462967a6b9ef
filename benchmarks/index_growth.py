"""Growing an index: one more item in a hundred against building the index anew, with the same rankings.

Items have titles, categories and brands of random words; the model has the shape of gin/models/tiny.gin and random weights, so
that the embedding of texts, which grows with the model, takes as small a share as it ever does. The last line is JSON; `ratio`
is the time to grow over the time to build.

  python benchmarks/index_growth.py [--quick]

--quick: 10,000 items in place of 100,000.
"""

import argparse
import json
import time
import types

import gin
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from calrec_jax import configurables
from calrec_jax.inference.generate import padded, prefill, to_row
from calrec_jax.inference.loading import Loaded
from calrec_jax.inference.noise import user_keys
from calrec_jax.inference.prefixes import make_prefixes
from calrec_jax.inference.sampling import sample
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.ranking.index import Index, build_index
from calrec_jax.ranking.rankers import Rankers
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary


def catalogue(n_items: int) -> tuple[list[str], list[dict[str, str]]]:
  """Items of random words, some more frequent than others."""
  rng = np.random.default_rng(0)
  letters = rng.integers(0, 26, (5000, 9)) + ord('a')
  words = [bytes(row[:length].tolist()).decode() for row, length in zip(letters, rng.integers(3, 10, 5000), strict=True)]
  draw = lambda n: ' '.join(words[int(5000 * x * x)] for x in rng.random(n))
  items = [{'title': draw(6), 'category': draw(2), 'brand': draw(1), 'price': f'${rng.integers(1, 99)}.99'}
           for _ in range(n_items)]
  return [f'item{number}' for number in range(n_items)], items


def random_model(items: list[dict[str, str]]) -> Loaded:
  """What a checkpoint would be loaded to."""
  template = ItemTemplate()
  vocabulary = train_vocabulary([template.item_text(item) for item in items[:2000]], size=2048,
                                phrases=template_phrases(template))
  configurables.parse(['gin/models/tiny.gin'], [], [])
  shape = {name: gin.query_parameter(f'decoder.{name}') for name in
           ('n_layers', 'embed_dim', 'n_heads', 'n_kv_heads', 'head_dim', 'ff_dim')}
  decoder = Decoder(DecoderConfig(vocab_size=vocabulary.vocab_size, dtype='float32', **shape))
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = nn.meta.unbox(jax.jit(decoder.init)(jax.random.key(0), tokens, tokens + 1, tokens))['params']
  found = types.SimpleNamespace(model_dir='random')
  return Loaded(found, decoder, params, vocabulary, template, {'inputs': 448, 'targets': 64})


def rankings(loaded: Loaded, index: Index) -> list:
  """Of four users by every ranker: item numbers and scores."""
  prefixes = make_prefixes(loaded.vocabulary, index.tokens, max_item_tokens=64, max_length=448)
  rng = np.random.default_rng(1)
  tokens_UP, lengths_U = padded([prefixes.tokens(rng.integers(0, 1000, 5)) for _ in range(4)], 448)
  prefix = prefill(loaded.decoder, loaded.by_layer, tokens_UP, lengths_U, loaded.vocabulary.bos_id is not None)
  samples = sample(loaded.decoder, loaded.by_layer, prefix, user_keys(0, list('abcd')), n_samples=8, max_new_tokens=24,
                   eos_id=loaded.vocabulary.eos_id)
  rows = [to_row(str(user), user, samples, loaded.vocabulary) for user in range(4)]
  rankers = Rankers(loaded, index, ('bm25', 'constrained', 'dense', 'likelihood', 'fused'))
  return rankers.rank(prefix, [(row['texts'], row['logprobs']) for row in rows])


def timed(build: callable) -> tuple[float, Index]:
  begun = time.perf_counter()
  index = build()
  return time.perf_counter() - begun, index


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--quick', action='store_true')
  n_items = 10_000 if parser.parse_args().quick else 100_000
  ids, items = catalogue(n_items + n_items // 100)
  loaded = random_model(items)
  build_index(ids[:3000], items[:3000], loaded)  # compiles
  _, old = timed(lambda: build_index(ids[:n_items], items[:n_items], loaded))
  build_index(ids[:n_items + 5], items[:n_items + 5], loaded, old=old)
  grow_seconds, grown = timed(lambda: build_index(ids, items, loaded, old=old))
  build_seconds, built = timed(lambda: build_index(ids, items, loaded))
  for user_grown, user_built in zip(rankings(loaded, grown), rankings(loaded, built), strict=True):
    for name, ranked in user_grown.items():
      assert (ranked.items == user_built[name].items).all(), name
      np.testing.assert_allclose(ranked.scores, user_built[name].scores, rtol=1e-5, err_msg=name)
  print(f'{n_items} items: {build_seconds:.1f} s to build, {grow_seconds:.2f} s to grow by 1 %; equal rankings by every ranker')
  print(json.dumps({'name': 'index_growth', 'ratio': grow_seconds / build_seconds, 'build_seconds': build_seconds,
                    'grow_seconds': grow_seconds, 'items': n_items}))


if __name__ == '__main__':
  main()
