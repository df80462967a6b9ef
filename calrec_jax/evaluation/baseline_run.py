"""All baselines on one data set, judged alike: an evaluation folder of their own (`calrec baselines`)."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

from calrec_jax import outputs, provenance
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines import bm25_last, item_knn, last_item, popularity, recent_popularity, sasrec, transitions
from calrec_jax.evaluation.judging import Scorer, judge
from calrec_jax.evaluation.protocols import Protocol
from calrec_jax.text.templates import ItemTemplate

# The cheap ones first; SASRec is trained.
BASELINES: dict[str, Callable[[Histories, str, ItemTemplate], Scorer]] = {
  'popularity': lambda data, split, template: popularity.scorer(data, split),
  'recent_popularity': lambda data, split, template: recent_popularity.scorer(data, split),
  'last_item': lambda data, split, template: last_item.scorer(data, split),
  'transitions': lambda data, split, template: transitions.scorer(data, split),
  'item_knn': lambda data, split, template: item_knn.scorer(data, split),
  'bm25_last': lambda data, split, template: bm25_last.scorer(data, split, template),
}
METHODS = (*BASELINES, 'sasrec')


def run_baselines(histories: Histories, out: str | os.PathLike, *, protocol: Protocol, methods: Sequence[str],
                  template: ItemTemplate, sasrec_options: sasrec.SasrecOptions) -> dict:
  """Ranks with each baseline and measures: writes the evaluation folder `out`; returns what its metrics.json holds.

  Args:
    histories: the data set.
    out: a folder that does not exist yet, or is empty; it appears whole or not at all.
    protocol: who is judged, and how.
    methods: some of `METHODS`.
    template: how BM25's texts are written.
    sasrec_options: of SASRec; it stops on the validation split, whatever split is judged, with the protocol's seen items.

  Raises:
    UserError: an unknown method, nobody to evaluate, a data set of another split, or `out` in use.
  """
  outputs.check_unused(out)
  if unknown := [name for name in methods if name not in METHODS]:
    raise UserError(f'methods: {unknown[0]!r} is no baseline; choose some of {", ".join(METHODS)}.')
  protocol.rules(histories)
  protocol.users(histories)
  scorers, facts = {}, {}
  for name in dict.fromkeys(methods):
    if name == 'sasrec':
      stops_by = Protocol(split='validation', seen_items=protocol.seen_items)
      candidates = None if protocol.seen_items == 'kept' else functools.partial(stops_by.candidates, histories)
      trained = sasrec.train(histories, sasrec_options, candidates=candidates)
      facts[name] = {'options': dataclasses.asdict(sasrec_options), 'epochs': trained.epochs, 'best_epoch': trained.best_epoch}
      scorers[name] = sasrec.scorer(histories, protocol.split, trained=trained)
    else:
      scorers[name] = BASELINES[name](histories, protocol.split, template)
  with outputs.new_folder(out) as folder:
    result = judge(folder, scorers, histories, protocol)
    outputs.write_json(folder / 'metrics.json', result)
    provenance.write(folder, gin_text='', data={histories.name: histories.fingerprint}, **facts)
  return result
