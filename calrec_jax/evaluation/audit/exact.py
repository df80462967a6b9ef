"""Generated texts whose log-probabilities are not those that the checkpoint gives them after the user's own history."""

from collections.abc import Iterator, Mapping

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.evaluation.audit.findings import SERIOUS, Finding, finding, user_label
from calrec_jax.evaluation.audit.folders import Folder
from calrec_jax.evaluation.generations import NAME as GENERATIONS
from calrec_jax.evaluation.generations import Generation, read_generations
from calrec_jax.inference.generate import context, padded, prefill
from calrec_jax.inference.likelihood import log_likelihoods
from calrec_jax.inference.loading import Loaded
from calrec_jax.inference.prefixes import Prefixes, make_prefixes
from calrec_jax.ranking.order import id_hash
from calrec_jax.text.item_tokens import item_tokens

CHECK = 'log-probabilities of generations'
USERS = 8  # those whose ids have the smallest SHA-256: a draw that knows no result
TEXTS = 32  # of a user, the most probable first
TOLERANCE = 1e-3  # nats a token; float32 on two machines differs by far less, bfloat16 by more
CHANCE = 1e-3  # that a user is told of whose own texts were all written in other tokens
BUCKET = 64


def check_exact(dataset: Histories, folder: Folder, loaded: Loaded, *, n_users: int = USERS, tolerance: float = TOLERANCE
                ) -> Iterator[Finding]:
  """Computes the log-probabilities of a few users' texts anew, each after the user's own prefix.

  A text is compared where it was finished and where its tokens, as the vocabulary cuts it, give it back. The model may have
  written it in other tokens, which the file does not tell: then the numbers differ, seldom after training, mostly before. Of
  another user's texts none agrees. So a user is told of who has no text that agrees within `tolerance` a token, the end
  counted, where the other users' share of texts that do makes that improbable (`CHANCE`), or where they have none either.

  Raises:
    UserError: the generations are broken, or of another step or vocabulary than the checkpoint's; nothing can be compared.
  """
  if not (folder.path / GENERATIONS).is_file() or (folder.data and dataset.fingerprint not in folder.data.values()):
    return
  _check_same(folder, loaded)
  split = folder.split or 'test'
  seen_U = dataset.visible(split)
  number_of = {user_id: user for user, user_id in enumerate(dataset.user_ids)}
  generations = {number_of[user_id]: each for user_id, each in read_generations(folder.path).items()
                 if user_id in number_of and seen_U[number_of[user_id]] >= 2}
  drawn = sorted(generations, key=lambda user: id_hash(dataset.user_ids[user]))
  candidates = {}
  for user in drawn:
    if len(candidates) == n_users:
      break
    if found := _comparable(generations[user], loaded):
      candidates[user] = found
  if not candidates:
    raise UserError(f'{folder.path}: none of its texts is finished and has tokens of its own; generate texts with a trained '
                    'checkpoint.')
  prefixes = _prefixes(dataset, loaded)
  users = list(candidates)
  own_U = [prefixes.newest(context(dataset, user, split))[0] for user in users]
  differences = _differences(own_U, candidates, prefixes, loaded)
  agreeing_U, texts_U = (np.array(list(map(count, differences))) for count in (lambda errors: (errors <= tolerance).sum(), len))
  share = agreeing_U.sum() / max(texts_U[agreeing_U > 0].sum(), 1)
  told_U = (agreeing_U == 0) & ((1 - share)**texts_U < CHANCE if share else True)
  wrong = [(user, errors) for user, errors, told in zip(users, differences, told_U, strict=True) if told]
  if wrong:
    yield finding(
        CHECK, SERIOUS, f'the texts of {len(wrong)} of {len(users)} users in {folder.path} do not have the log-probabilities '
        f"that {loaded.found.folder} gives them after the users' own histories: they are of other users, or of another model. "
        'Run `calrec infer` anew.', len(wrong),
        (f'{user_label(dataset, user)}: {len(errors)} texts, the nearest is {errors.min():.3f} nats a token off'
         for user, errors in wrong))


def _check_same(folder: Folder, loaded: Loaded) -> None:
  record, found = folder.record, loaded.found
  for what, there, here in (('step', record.get('step'), found.step),
                            ('vocabulary', record.get('vocabulary'), loaded.vocabulary.fingerprint)):
    if there not in (None, here):
      raise UserError(f'{folder.path}: was made by a checkpoint of {what} {there}, and {found.folder} has {here}; give the one '
                      f'that it was made by ({record.get("checkpoint")}).')


def _comparable(generation: Generation, loaded: Loaded) -> list[tuple[np.ndarray, float]]:
  """(tokens, log-probability as in the file) of the texts that can be compared, the most probable first."""
  finished = generation.finished or [True] * len(generation.texts)
  texts = [(logprob, text) for text, logprob, ended in zip(generation.texts, generation.logprobs, finished, strict=True)
           if ended and text.strip()]
  texts = sorted(texts, reverse=True)[:TEXTS]
  table = item_tokens([text for _, text in texts], loaded.vocabulary)
  return [(table.item(number), logprob) for number, (logprob, text) in enumerate(texts)
          if loaded.vocabulary.decode(table.item(number).tolist()).lstrip(' ') == text]


def _prefixes(dataset: Histories, loaded: Loaded) -> Prefixes:
  table = item_tokens([loaded.template.item_text(item) for item in dataset.items], loaded.vocabulary)
  return make_prefixes(loaded.vocabulary, table, max_item_tokens=loaded.lengths['targets'], max_length=loaded.lengths['inputs'])


def _differences(items_U: list[np.ndarray], candidates: Mapping[int, list[tuple[np.ndarray, float]]], prefixes: Prefixes,
                 loaded: Loaded) -> list[np.ndarray]:
  """|file - computed| in nats a token, of each user's texts: float64 [texts] each."""
  tokens_U = [prefixes.tokens(items) for items in items_U]
  longest = -(-max(map(len, tokens_U)) // BUCKET) * BUCKET
  prefix = prefill(loaded.decoder, loaded.by_layer, *padded(tokens_U, longest), loaded.vocabulary.bos_id is not None)
  lists = list(candidates.values())
  C, S = max(map(len, lists)), max(len(tokens) for each in lists for tokens, _ in each)
  tokens_UCS, lengths_UC = np.zeros((len(lists), C, S), np.int32), np.zeros((len(lists), C), np.int32)
  for user, each in enumerate(lists):
    for place, (tokens, _) in enumerate(each):
      tokens_UCS[user, place, :len(tokens)], lengths_UC[user, place] = tokens, len(tokens)
  computed_UC = log_likelihoods(loaded.decoder, loaded.by_layer, prefix, tokens_UCS, lengths_UC,
                                eos_id=loaded.vocabulary.eos_id)
  return [np.abs([logprob for _, logprob in each] - computed_UC[user, :len(each)]) / (lengths_UC[user, :len(each)] + 1)
          for user, each in enumerate(lists)]
