"""What SeqIO reports of a Task: texts that are right, and how probable the right ones were."""

import seqio
import tiny

from calrec_jax.tasks import registry
from calrec_jax.tasks.seqio_metrics import exact_match, log_likelihood


def test_texts_are_compared_without_the_space_around_them():
  targets, predictions = ['Title: a.', ' Title: b.', 'c', 'd'], [' Title: a.', 'Title: b.', 'C', 'Title: d']
  assert exact_match(targets, predictions) == {'exact_match': 0.5}
  assert exact_match(['a  b'], ['a b']) == {'exact_match': 0.0}


def test_log_likelihoods_are_averaged():
  assert log_likelihood(['a', 'b'], [-1.0, -2.0]) == {'log_likelihood': -1.5}


def test_seqio_knows_which_of_the_model_s_outputs_they_are_of(tiny_store):
  registry.register(tiny_store / 'data', tiny.inputs(tiny_store).vocabulary)
  task = seqio.TaskRegistry.get('books')
  assert (task.predict_metric_fns, task.score_metric_fns) == ([exact_match], [log_likelihood])
