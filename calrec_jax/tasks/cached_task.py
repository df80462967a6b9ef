"""A Task that knows what its examples depend on, and takes no cache of other ones."""

import json
import os

import seqio
import tensorflow as tf

from calrec_jax.errors import UserError

DESCRIPTION = 'calrec.json'  # in the folder of a cached Task


class HistoriesTask(seqio.Task):
  """A Task of a `HistoriesSource`."""

  @property
  def cached_description(self) -> dict:
    """What the examples in a cache depend on."""
    return {'histories': self.source.fingerprint, 'vocabulary': self.output_features['targets'].vocabulary.fingerprint,
            **self.source.options}

  @property
  def cache_dir(self) -> str | None:
    """Where SeqIO finds the cache. Raises UserError if it was made of something else."""
    found = super().cache_dir
    made = found and read_description(found)
    if made and made != (now := self.cached_description):
      differing = ', '.join(sorted(key for key in made.keys() | now.keys() if made.get(key) != now.get(key)))
      raise UserError(f'{found}: the cache of {self.name!r} was made with another {differing}; make one with `calrec cache` in '
                      'another folder, or do without (USE_CACHED_TASKS = False).')
    return found


def read_description(folder: str) -> dict | None:
  """What the cache in a folder was made of; None: it is not there whole, or SeqIO's own tool made it, which does not say."""
  path = os.path.join(folder, DESCRIPTION)
  if not (tf.io.gfile.exists(path) and tf.io.gfile.exists(os.path.join(folder, 'COMPLETED'))):
    return None
  with tf.io.gfile.GFile(path) as file:
    return json.load(file)
