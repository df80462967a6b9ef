"""A trained tiny checkpoint, a catalogue with items that nobody has bought, its index, and users whose prefixes were read."""

from collections.abc import Callable

import cold_shop
import numpy as np
import pytest
from cold_shop import HISTORIES, OPTIONS, TEXTS

from calrec_jax.inference.generate import padded, prefill
from calrec_jax.inference.loading import Loaded, load
from calrec_jax.inference.prefixes import make_prefixes
from calrec_jax.ranking.index import Index, build_index
from calrec_jax.ranking.rankers import RANKERS, RankerOptions, Rankers


@pytest.fixture(scope='session')
def loaded(trained_run) -> Loaded:
  return load(trained_run)


@pytest.fixture(scope='session')
def catalogue(tiny_store) -> tuple[list[str], list[dict[str, str]]]:
  return cold_shop.catalogue(tiny_store)


@pytest.fixture(scope='session')
def index(catalogue, loaded) -> Index:
  return build_index(*catalogue, loaded)


@pytest.fixture(scope='session')
def prefix(loaded, index):
  """Of the first two users of `HISTORIES`: as many as the recommender's tests have in a batch, for one program."""
  prefixes = make_prefixes(loaded.vocabulary, index.tokens, max_item_tokens=loaded.lengths['targets'],
                           max_length=loaded.lengths['inputs'])
  items = [prefixes.newest(np.array([index.item_numbers[item_id] for item_id in history]))[0] for history in HISTORIES[:2]]
  tokens_UP, lengths_U = padded([prefixes.tokens(each) for each in items], 64)
  return prefill(loaded.decoder, loaded.by_layer, tokens_UP, lengths_U, loaded.vocabulary.bos_id is not None)


@pytest.fixture(scope='session')
def rank(loaded, prefix) -> Callable[..., list[dict]]:
  """Ranks an index for the users: each one's rankings by name."""
  def rank(index: Index, names=RANKERS, allowed_UI=None, **options):
    return Rankers(loaded, index, names, RankerOptions(**OPTIONS | options)).rank(prefix, TEXTS, allowed_UI)
  return rank
