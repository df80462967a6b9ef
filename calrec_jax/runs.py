"""The jobs that begin with names: a checkpoint, a data set, a file of generations become objects, and the work is called."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from calrec_jax import provenance, storage
from calrec_jax.data import histories, oracle
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.baselines.popularity import train_counts
from calrec_jax.evaluation.evaluate import evaluate
from calrec_jax.evaluation.fusion_weights import learn
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.inference.generate import candidates_file, generate
from calrec_jax.inference.loading import Loaded, load
from calrec_jax.models.decoding import Prefix
from calrec_jax.ranking.bm25 import LUCENE, Bm25Options
from calrec_jax.ranking.candidates import read_candidates
from calrec_jax.ranking.catalogue import from_histories
from calrec_jax.ranking.index import build_index, check_fits, load_index
from calrec_jax.ranking.rank_fusion import read_weights, write_weights
from calrec_jax.ranking.rankers import DEFAULTS, RANKERS, RankerOptions, Rankers, check_names, needed_by, unseen
from calrec_jax.text.item_tokens import load_item_tokens
from calrec_jax.text.templates import ItemTemplate


def find_data(data_dir: str | os.PathLike, name: str) -> pathlib.Path:
  """The histories folder of one data set, on this machine. Raises UserError, with the names that are there, if it is not."""
  folder = storage.join(data_dir, name)
  if not storage.is_dir(folder):
    there = [other for other in storage.names(data_dir) if storage.is_dir(storage.join(data_dir, other))]
    raise UserError(f'{folder}: no such histories folder (there are: {", ".join(there) or "none"}); give DATA_DIR and the name '
                    'of one data set as MIXTURE_OR_TASK_NAME.')
  return storage.local(folder)


def infer(*, checkpoint: str, data_dir: str, task_name: str, out: str, sample: Callable[..., dict] = generate,
          rankers: Sequence[str] = ('bm25',), ranker_options: RankerOptions = DEFAULTS, bm25: Bm25Options = LUCENE,
          index: str | None = None, exclude_seen: bool = False, dtype: str = 'auto', gin_text: Callable[[], str] = str
          ) -> dict[str, Any]:
  """Candidates for the users of a data set, into the folder `out`. The same call resumes.

  Args:
    checkpoint: a run's folder (its newest step) or one step's; it brings its vocabulary, texts and lengths.
    data_dir: holds the histories folders.
    task_name: the data set.
    out: the folder to write: `generations.jsonl.gz`, where texts are sampled, and a `candidates-<ranker>.jsonl.gz` for each
      ranker but a lone `bm25`, which `rank` runs on the generations. On the validation split `fused` also writes its weights.
    sample: `generate` with its options set.
    rankers: which of `ranking.rankers.RANKERS`.
    ranker_options: their options.
    bm25: which BM25.
    index: a folder of `calrec index` over the data set's items; None: it is made for this run.
    exclude_seen: whether items of a user's context are no candidates.
    dtype: computation, see `DecoderConfig`.
    gin_text: returns the operative configuration, for the record.

  Returns:
    The report of `generate`, and `fusion`, what was learned, where it was.
  """
  names = check_names(rankers)
  names = RANKERS if names == ('fused',) else names  # what is fused is written too
  data_folder = find_data(data_dir, task_name)
  data = histories.load(data_folder)
  loaded = load(checkpoint, dtype=dtype)
  vocabulary, found = loaded.vocabulary, loaded.found
  searches = {}
  if exclude_seen and names == ('bm25',):
    raise UserError('infer.exclude_seen: a lone bm25 ranks in `calrec evaluate`; name another ranker too, or leave this out.')
  if names != ('bm25',):
    searched = _searched(loaded, data, names, ranker_options, bm25, index, exclude_seen)
    used = needed_by(names, ranker_options.shortlist)
    weights = read_weights(ranker_options.fusion) if ranker_options.fusion else None  # by content: the file may change
    searches = {'rank': searched, 'texts': 'bm25' in used, 'ranking': {
        'rankers': names, **dataclasses.asdict(ranker_options), 'fusion': weights, 'bm25': dataclasses.asdict(bm25),
        'exclude_seen': exclude_seen}}
  with storage.Workplace(out, resumes=True) as work, _folder(work.folder):
    report = sample(
        decoder=loaded.decoder, params=loaded.by_layer, vocabulary=vocabulary, histories=data,
        item_tokens=load_item_tokens(data_folder, data, loaded.template, vocabulary),
        work=work, out=work.folder / GENERATIONS,
        identity=f'{found.model_dir.name} step {found.step}, weights {loaded.weights[:16]}',
        max_prefix_length=loaded.lengths['inputs'], max_item_tokens=loaded.lengths['targets'], **searches)
    if jax.process_index():  # the first process has the outputs
      return report
    if 'fused' in names and report['split'] == 'validation':
      report['fusion'] = _learn_fusion(work.folder, data, [name for name in names if name != 'fused'])
  provenance.write(out, gin_text=gin_text(), checkpoint=str(checkpoint), step=found.step, report=report,
                   data={data.name: data.fingerprint}, vocabulary=vocabulary.fingerprint,
                   template=dataclasses.asdict(loaded.template))
  provenance.write_scalars(out, {f'infer/{name}': value for name, value in report.items() if isinstance(value, int | float)})
  return report


def _searched(loaded: Loaded, data: Histories, names: Sequence[str], options: RankerOptions, bm25: Bm25Options,
              folder: str | None, exclude_seen: bool) -> Callable[[Prefix, list[dict], list[np.ndarray]], list[dict]]:
  """A function that ranks a batch of users, for `generate`."""
  if folder is None:
    needed = needed_by(names, options.shortlist)
    index = build_index(data.item_ids, data.items, loaded, bm25=bm25, embed='dense' in needed)
  else:
    index = load_index(folder)
    check_fits(index, loaded)
    if index.catalogue.item_ids != data.item_ids or index.catalogue.texts != from_histories(data, loaded.template).texts:
      raise UserError(f'{folder}: is an index of another catalogue than that of {data.name}; build it anew with '
                      '`calrec index`.')
    if index.bm25.options != bm25:
      raise UserError(f'{folder}: was made with another BM25 ({index.bm25.options}) than this run has ({bm25}).')
  rankers = Rankers(loaded, index, names, options, train_counts(data))

  def rank(prefix: Prefix, rows: list[dict], contexts: list[np.ndarray]) -> list[dict]:
    texts = [(row['texts'], row['logprobs']) for row in rows] if rankers.samples else None
    allowed_UI = unseen(contexts, len(data.item_ids)) if exclude_seen else None
    if exclude_seen and not allowed_UI.any(axis=1).all():
      user_id = rows[int(np.argmin(allowed_UI.any(axis=1)))]['user_id']
      raise UserError(f'infer.exclude_seen: user {user_id!r} has every item of the catalogue in the context; leave it out.')
    return [{name: (ranked.items, ranked.scores) for name, ranked in found.items()}
            for found in rankers.rank(prefix, texts, allowed_UI)]
  return rank


def _learn_fusion(folder: pathlib.Path, data: Histories, names: Sequence[str]) -> dict[str, Any]:
  """Learns from the users' validation targets what each ranking is worth; writes it, and returns it."""
  numbers = {item_id: number for number, item_id in enumerate(data.item_ids)}
  by_name = {name: read_candidates(candidates_file(folder, name), numbers) for name in names}
  target_of = {user_id: int(data.seen(user, 'validation')[-1])
               for user, user_id in enumerate(data.user_ids) if user_id in by_name[names[0]]}
  try:
    learned = learn([{name: lists[user] for name, lists in by_name.items()} for user in target_of], list(target_of.values()))
  except UserError as error:  # the candidates are whole, and stay
    return {'none': str(error)}
  write_weights(folder, learned)
  return learned


@contextlib.contextmanager
def _folder(folder: pathlib.Path) -> Iterator[None]:
  """Makes a folder to write into; takes it away again if nothing was written. UserError if it cannot be made."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{folder}: cannot be written ({error.strerror}); choose another place.') from error
  try:
    yield
  finally:
    with contextlib.suppress(OSError):  # not empty: it holds results, or what the same call goes on from
      folder.rmdir()


def rank(*, data_dir: str, task_name: str, template: ItemTemplate, out: str, generations: str | None = None,
         store: str | None = None, evaluate: Callable[..., dict] = evaluate,
         gin_text: Callable[[], str] = str) -> dict[str, Any]:
  """Ranks the whole catalogue for every user and judges the rankings, into the folder `out`.

  Args:
    data_dir: holds the histories folders.
    task_name: the data set.
    template: how an item becomes the text that BM25 indexes.
    out: the folder to write: `metrics.json` and `rankings-<method>.jsonl.gz`.
    generations: a file that `infer` wrote, or its folder; None: the baselines alone.
    store: a generated store, whose own probabilities give the ceiling; None: no ceiling.
    evaluate: `evaluation.evaluate.evaluate` with its options set.
    gin_text: returns the operative configuration, for the record.

  Returns:
    The metrics.
  """
  data = histories.load(find_data(data_dir, task_name))
  ceiling = oracle.load_oracle(store, task_name).probabilities if store else None
  metrics = evaluate(histories=data, template=template, out=out, oracle=ceiling,
                     generations=None if generations is None else storage.local(generations))
  provenance.write(out, gin_text=gin_text(), data={data.name: data.fingerprint}, generations=generations and str(generations))
  provenance.write_scalars(out, {f'{metrics["protocol"]["split"]}/{method}/{name}': value
                                 for method, values in metrics['methods'].items() for name, value in values.items()})
  return metrics
