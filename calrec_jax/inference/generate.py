"""Generates item texts for every user of a data set, and can be stopped and resumed (method: Inference).

The output is `generations.jsonl.gz`, a line a user: {"user_id": "u7", "texts": ["Title: …", …], "logprobs": [-3.2, …],
"finished": [true, …]}, most probable text first. Where rankers rank as well, each has a `candidates-<ranker>.jsonl.gz` beside
it: {"user_id": "u7", "item_ids": ["a", …], "scores": [0.9, …]}, best item first.
"""

import functools
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import jax
import numpy as np
import tqdm
from orbax.checkpoint import multihost

from calrec_jax import outputs, storage
from calrec_jax.data import json_lines
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.inference.noise import user_keys
from calrec_jax.inference.partial import Partial, finished_rows, partial_file, partial_files
from calrec_jax.inference.prefixes import form_batches, make_prefixes
from calrec_jax.inference.sampling import Samples, sample
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoding import Prefix
from calrec_jax.text.item_tokens import ItemTokens
from calrec_jax.text.vocabularies import TokenizerVocabulary

SPLITS = ('test', 'validation')

Candidates = Mapping[str, tuple[np.ndarray, np.ndarray]]
Rank = Callable[[Prefix, list[dict], list[np.ndarray]], Sequence[Candidates]]


def generate(*, decoder: Decoder, params: Mapping, vocabulary: TokenizerVocabulary, histories: Histories,
             item_tokens: ItemTokens, out: str | os.PathLike, identity: str, split: str = 'test', n_samples: int = 32,
             temperature: float = 0.5, top_p: float = 1.0, max_new_tokens: int | None = None, max_prefix_length: int = 448,
             max_item_tokens: int = 64, users_per_batch: int = 8, seed: int = 0, max_users: int | None = None,
             bucket: int = 64, texts: bool = True, rank: Rank | None = None,
             ranking: Mapping[str, object] | None = None, work: storage.Workplace | None = None) -> dict:
  """Samples texts of each user's next item, and writes them to the file `out`.

  Finished batches are kept in `<out>.partial` until all are; the same call takes them up again. Equal inputs give equal
  bytes (same kind of machine), whether stopped or not. Several processes share the batches, and the first one writes the
  outputs: the folder, or the bucket of `work`, must be one that all see. Their number may change when a run goes on.

  Args:
    decoder: the model.
    params: the parameters by layer (`decoding.by_layer`).
    vocabulary: the one that the model was trained with.
    histories: the data set. Users of fewer than three events have no leave-one-out split, and are left out.
    item_tokens: the catalogue's tokens in this vocabulary.
    out: the file to write.
    identity: names the parameters' content (a checkpoint and its step, or a hash): a run is not resumed with others.
    split: `test` or `validation`: the target is the last event that the split may see, the context is what is before.
    n_samples: texts sampled for a user; equal texts are merged.
    temperature: of the sampling; log-probabilities are at temperature 1 always. 0: the most probable token, always.
    top_p: only the most probable tokens are sampled that have this probability together; 1: all.
    max_new_tokens: the longest text, its end included. None: the 99.9th percentile of the catalogue's.
    max_prefix_length: tokens; a longer context keeps its newest whole items.
    max_item_tokens: cap on an item's tokens, as in training.
    users_per_batch: users sampled together.
    seed: of the noise, which is a function of (seed, user id, sample, place in the text).
    max_users: if set, only the first so many users.
    bucket: prefixes are padded to multiples of this length.
    texts: whether to sample texts; without them there is no file of generations.
    rank: ranks the catalogue for a batch of users: from their prefixes, as they were read, their rows (with texts, if these
      are sampled) and their contexts (`context`) to each one's candidates by ranker, {ranker: (item numbers, scores)}.
    ranking: what `rank` depends on, JSON values by name; `rankers` are their names.
    work: where `out` is in a copy of a bucket's folder, what keeps the two the same.

  Returns:
    The report: counts of users; `texts_per_user`; shares (0 to 1) of `unfinished`, `empty` and `exact_match` (equal to
    a text of the catalogue) among the users' distinct texts; `mean_tokens` a sample, its end not counted; `seconds` of
    this call.

  Raises:
    UserError: an option out of range, `out` exists, the partial file was begun with other settings, the vocabulary does
      not fit the model, nobody to generate for, the model's output is not finite.
  """
  began = time.monotonic()
  path, work = pathlib.Path(out), work or storage.Workplace(pathlib.Path(out).parent)
  names = (ranking or {}).get('rankers', ())
  there = [file for file in ([path] if texts else []) + [candidates_file(path.parent, name) for name in names] if file.exists()]
  if there and not partial_files(path):  # with it they are of a run that was stopped while it wrote
    raise UserError(f'{there[0]}: the output is already there; choose another place, or remove it first.')
  options = {'split': split, 'n_samples': n_samples, 'temperature': temperature, 'top_p': top_p,
             'max_new_tokens': max_new_tokens, 'max_prefix_length': max_prefix_length, 'max_item_tokens': max_item_tokens,
             'users_per_batch': users_per_batch, 'seed': seed, 'max_users': max_users, 'bucket': bucket}
  check_options(options)
  if max_new_tokens is None:
    max_new_tokens = options['max_new_tokens'] = default_max_new_tokens(item_tokens, max_item_tokens)
  sampler = functools.partial(
      sample, decoder, params, n_samples=n_samples, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens,
      eos_id=vocabulary.eos_id, forbidden=forbidden_ids(vocabulary, decoder.config.vocab_size))
  prefixes = make_prefixes(vocabulary, item_tokens, max_item_tokens=max_item_tokens, max_length=max_prefix_length)
  users = eligible_users(histories, split, max_users)
  contexts = [context(histories, user, split) for user in users]
  kept = [prefixes.newest(items) for items in contexts]
  batches = form_batches(np.asarray([length for _, length in kept]), users_per_batch=users_per_batch, bucket=bucket)
  settings = {'identity': identity, 'data': histories.fingerprint, 'vocabulary': vocabulary.fingerprint,
              'item_tokens': _digest(item_tokens), 'dtype': str(decoder.config.compute_dtype), **options,
              'texts': texts, 'ranking': dict(ranking or {})}
  def candidates_of(chosen: np.ndarray, length: int) -> list[dict]:
    """The rows of a batch. It has a fixed shape: copies of its last user fill it up, which end when that one ends."""
    chosen_U = np.pad(chosen, (0, users_per_batch - len(chosen)), mode='edge')
    ids_U = [histories.user_ids[users[index]] for index in chosen_U]
    tokens_UP, lengths_U = padded([prefixes.tokens(kept[index][0]) for index in chosen_U], length)
    prefix = prefill(decoder, params, tokens_UP, lengths_U, vocabulary.bos_id is not None)
    rows = [{'user_id': user_id} for user_id in ids_U]
    if texts:
      samples = sampler(prefix, user_keys(seed, ids_U))
      if not np.isfinite(samples.logprobs_UNT).all():
        raise UserError(f'{identity}: the model gives log-probabilities that are not finite; take another one.')
      rows = [to_row(user_id, row, samples, vocabulary) for row, user_id in enumerate(ids_U)]
    if rank is not None:
      for row, found in zip(rows, rank(prefix, rows, [contexts[index] for index in chosen_U]), strict=True):
        row['candidates'] = {name: [items.tolist(), scores.tolist()] for name, (items, scores) in found.items()}
    return rows[:len(chosen)]

  ids = [histories.user_ids[user] for user in users]
  n_resumed = _run(path, work, settings, batches, ids, candidates_of)
  report = {'split': split, 'users': len(users), 'users_resumed': n_resumed, 'max_new_tokens': max_new_tokens,
            'users_cut': sum(len(items) < len(of_user) for (items, _), of_user in zip(kept, contexts, strict=True))}
  if jax.process_index() == 0:
    rows = finished_rows(path, settings)
    ordered = [rows[user_id] for user_id in ids]
    _write(path, ordered, names, texts, histories.item_ids)
    if texts:
      report |= text_shares(ordered, catalogue_texts(item_tokens, vocabulary), n_samples)
  seconds = time.monotonic() - began
  return report | {'seconds': round(seconds, 3), 'users_a_second': round((len(users) - n_resumed) / max(seconds, 1e-9), 3)}


def _run(path: pathlib.Path, work: storage.Workplace, settings: Mapping, batches: Sequence[tuple[np.ndarray, int]],
         ids: Sequence[str], candidates_of: Callable[[np.ndarray, int], list[dict]]) -> int:
  """Works off the batches that are not finished, each process its share; returns how many users had been finished."""
  with Partial(partial_file(path, jax.process_index()), settings) as partial:
    done = finished_rows(path, settings)
    _wait('all have read what is finished')
    left = [batch for batch in batches if ids[batch[0][0]] not in done][jax.process_index()::jax.process_count()]
    total = sum(len(chosen) for chosen, _ in left)
    with tqdm.tqdm(total=total, desc='infer', unit=' users', mininterval=0.5, disable=jax.process_index() > 0) as bar:
      for chosen, length in left:
        partial.append(candidates_of(chosen, length))
        work.push(every=storage.PUSH_SECONDS)
        bar.update(len(chosen))
  work.push()
  _wait('all are done')
  if jax.process_count() > 1 and jax.process_index() == 0:
    work.pull()
  return len(done)


def _wait(what: str) -> None:
  """Until all processes have come here: as long as the slowest takes."""
  if jax.process_count() > 1:
    multihost.sync_global_processes(f'calrec_jax infer: {what}', timeout=7 * 24 * 3600)


def _write(path: pathlib.Path, rows: Sequence[Mapping], rankers: Sequence[str], texts: bool, item_ids: Sequence[str]) -> None:
  """Writes the outputs, and removes the partial files."""
  for name in rankers:
    write_rows(candidates_file(path.parent, name), (
        {'user_id': row['user_id'], 'item_ids': [item_ids[item] for item in row['candidates'][name][0]],
         'scores': row['candidates'][name][1]} for row in rows))
  if texts:
    write_rows(path, ({name: row[name] for name in ('user_id', 'texts', 'logprobs', 'finished')} for row in rows))
  for file in partial_files(path):
    file.unlink()


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(decoder: Decoder, params: Mapping, tokens_UP: np.ndarray, lengths_U: np.ndarray, bos: bool) -> Prefix:
  """`decoding.prefill`, compiled once for each (U, P)."""
  return decoding.prefill(decoder, params, tokens_UP, lengths_U, bos=bos, half_life=decoder.config.user_half_life)


def candidates_file(folder: pathlib.Path, ranker: str) -> pathlib.Path:
  """Where a ranker's candidates are, beside the generations."""
  return folder / f'candidates-{ranker}.jsonl.gz'


def check_options(options: Mapping[str, object]) -> None:
  """Raises UserError for an option out of range."""
  if options['split'] not in SPLITS:
    raise UserError(f"split = {options['split']!r}: choose one of {SPLITS}.")
  if not 0 <= options['temperature'] < float('inf'):
    raise UserError(f"temperature = {options['temperature']}: give a finite number >= 0 (the method: 0.5).")
  if not 0 < options['top_p'] <= 1:
    raise UserError(f"top_p = {options['top_p']}: give a number above 0, up to 1 (the method: 1).")
  for name in ('n_samples', 'max_new_tokens', 'max_prefix_length', 'max_item_tokens', 'users_per_batch', 'max_users',
               'bucket'):
    if options[name] is not None and options[name] < 1:
      raise UserError(f'{name} = {options[name]}: give at least 1.')


def eligible_users(histories: Histories, split: str, max_users: int | None = None) -> list[int]:
  """The numbers of the first `max_users` users that have three events or more, and a target of the split."""
  users = np.flatnonzero((np.diff(histories.offsets) >= 3) & (histories.visible(split) >= 2))[:max_users].tolist()
  if not users:
    raise UserError(f'data set {histories.name}: no user has three events and a target of the {split} split; use a larger one.')
  return users


def context(histories: Histories, user: int, split: str) -> np.ndarray:
  """The items that may be read to predict the user's target of the split: int32, in time order."""
  return histories.seen(user, split)[:-1]


def default_max_new_tokens(item_tokens: ItemTokens, max_item_tokens: int) -> int:
  """The 99.9th percentile of the items' lengths, capped, with a place for the end."""
  percentile = int(np.ceil(np.percentile(np.diff(item_tokens.offsets), 99.9)))
  return min(percentile, max_item_tokens) + 1


def forbidden_ids(vocabulary: TokenizerVocabulary, vocab_size: int) -> np.ndarray:
  """bool [V]: BOS, padding, and rows of the embedding that no token has. UserError if the model has too few rows."""
  if vocabulary.vocab_size > vocab_size:
    raise UserError(f'The vocabulary has {vocabulary.vocab_size} tokens, the model {vocab_size}: give the vocabulary '
                    'that the model was trained with.')
  forbidden_V = np.arange(vocab_size) >= vocabulary.vocab_size
  for special in {vocabulary.bos_id, vocabulary.pad_id} - {None, vocabulary.eos_id}:
    # A vocabulary without padding says that it is id 0, which is a token like others then: it writes text.
    forbidden_V[special] = not vocabulary.decode([special])
  return forbidden_V


def padded(prefixes: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens int32 [U, length] with zeros after each prefix, lengths int32 [U])."""
  tokens_UP = np.zeros((len(prefixes), length), np.int32)
  for row, prefix in enumerate(prefixes):
    tokens_UP[row, :len(prefix)] = prefix
  return tokens_UP, np.asarray([len(prefix) for prefix in prefixes], np.int32)


def to_row(user_id: str, row: int, samples: Samples, vocabulary: TokenizerVocabulary) -> dict:
  """What the partial file keeps of a user: the line of the output, and `tokens`, the sum over all samples."""
  lengths_N = samples.lengths_UN[row]
  texts = [vocabulary.decode(tokens_T[:length].tolist()).lstrip(' ')
           for tokens_T, length in zip(samples.tokens_UNT[row], lengths_N, strict=True)]
  merged = merge(texts, samples.logprobs_UN[row].tolist(), samples.finished_UN[row].tolist())
  return {'user_id': user_id, **merged, 'tokens': int(lengths_N.sum())}


def merge(texts: Iterable[str], logprobs: Iterable[float], finished: Iterable[bool]) -> dict[str, list]:
  """Merges equal texts, sorts by log-probability, descending (then by text).

  A text may be sampled as several token sequences, or with and without its end. The log-probability that is kept is
  that of its most probable finished sample, of its most probable sample if none is finished; rounded to six decimals.
  """
  best: dict[str, tuple[bool, float]] = {}
  for text, logprob, is_finished in zip(texts, logprobs, finished, strict=True):
    best[text] = max(best.get(text, (False, -np.inf)), (is_finished, round(logprob, 6)))
  order = sorted(best, key=lambda text: (-best[text][1], text))
  return {'texts': order, 'logprobs': [best[text][1] for text in order], 'finished': [best[text][0] for text in order]}


def write_rows(path: pathlib.Path, rows: Iterable[Mapping]) -> None:
  """Writes JSON lines, whole or not at all, with the same bytes for the same rows."""
  try:
    with outputs.new_file(path) as scratch:
      json_lines.write(scratch, rows)
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror}); make room, and run the same command again.'
                    ) from error


def catalogue_texts(item_tokens: ItemTokens, vocabulary: TokenizerVocabulary) -> frozenset[str]:
  """The items' texts, as the vocabulary writes them."""
  pieces = map(item_tokens.item, range(len(item_tokens.offsets) - 1))
  return frozenset(vocabulary.decode(piece.tolist()).lstrip(' ') for piece in pieces)


def text_shares(rows: Sequence[Mapping], catalogue: Container[str], n_samples: int) -> dict:
  """What became of the texts, see `generate`. The shares are over all users' distinct texts."""
  texts = [text for row in rows for text in row['texts']]
  return {'texts_per_user': len(texts) / len(rows),
          'unfinished': sum(row['finished'].count(False) for row in rows) / len(texts),
          'empty': sum(not text.strip() for text in texts) / len(texts),
          'exact_match': sum(text in catalogue for text in texts) / len(texts),
          'mean_tokens': sum(row['tokens'] for row in rows) / (len(rows) * n_samples)}


def _digest(item_tokens: ItemTokens) -> str:
  digest = hashlib.sha256()
  for part in (np.asarray(item_tokens.offsets, '<i8'), np.asarray(item_tokens.tokens, '<i4')):
    digest.update(np.ascontiguousarray(part))  # where it lies: a mapped table is not copied
  return digest.hexdigest()
