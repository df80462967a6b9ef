"""SentencePiece models as `tokenizer.json`: pieces and scores become BPE merges, or a unigram table.

No space is put before a text: the pieces of a history are tokenized on their own, and must join to the whole text.
"""

import base64
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from calrec_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, in SentencePiece and in GGUF
SPACE = '▁'
_NEVER = -1e6  # the score of a piece that is not in use
_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type


def read(path: pathlib.Path) -> tuple[dict[str, Any], str | None, str | None]:
  """(the tokenizer.json, BOS, EOS) of a SentencePiece model file. Raises UserError for another kind of file."""
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2
  model = sentencepiece_model_pb2.ModelProto()
  try:
    model.ParseFromString(path.read_bytes())
  except OSError as error:
    raise UserError(f'{path}: the vocabulary cannot be read ({error.strerror}); give a tokenizer.json or tokenizer.model.'
                    ) from error
  except DecodeError as error:
    raise UserError(f'{path}: not a whole SentencePiece model ({error}); download it again.') from error
  if not (model.pieces and model.HasField('trainer_spec') and model.HasField('normalizer_spec')):
    raise UserError(f'{path}: not a whole SentencePiece model; download it again.')
  if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
    kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
    raise UserError(f'{path}: a SentencePiece model of the kind {kind}; known are BPE and UNIGRAM: take another tokenizer.')
  rules = model.normalizer_spec
  if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
    logging.warning('%s: its normalizer (%s) rewrites text before it is tokenized, so texts may not come back as they were.',
                    path, rules.name)
  pieces, scores, kinds = zip(*((p.piece, p.score, p.type) for p in model.pieces), strict=True)
  convert = bpe if model.trainer_spec.model_type == _BPE else _unigram
  spec = convert(pieces, scores, kinds, normalizers=_normalizers(rules))
  ends = [name if name in pieces else None for name in (model.trainer_spec.bos_piece, model.trainer_spec.eos_piece)]
  return spec, ends[0], ends[1]


def bpe(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *,
        normalizers: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
  """The tokenizer.json of a SentencePiece BPE: the best-scored merge first, wherever it stands in the text.

  Args:
    pieces: by id.
    scores: of each; the higher, the earlier is a pair merged to it.
    kinds: of each, as above.
    normalizers: what rewrites a text before its spaces become `SPACE`.
  """
  ids = {piece: i for i, piece in enumerate(pieces)}
  reached = [i for i, kind in enumerate(kinds) if kind == NORMAL]
  usable = {pieces[i] for i in reached}
  merges = []
  for i in sorted(reached, key=lambda i: (-scores[i], i)):
    splits = [(pieces[i][:n], pieces[i][n:]) for n in range(1, len(pieces[i]))]
    merges += sorted((pair for pair in splits if usable.issuperset(pair)), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
  model = {'type': 'BPE', 'dropout': None, 'unk_token': _unknown(pieces, kinds), 'continuing_subword_prefix': None,
           'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': BYTE in kinds, 'ignore_merges': False, 'vocab': ids,
           'merges': [list(pair) for pair in merges]}
  return _spec(model, pieces, kinds, normalizers)


def added_tokens(pieces: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
  """Pieces that are found in the text before all others, the longest first, or, if special, never."""
  # A piece with SPACE can only be found once the normalizer has made the text's spaces to it.
  return [{'id': i, 'content': piece, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': SPACE in piece,
           'special': kind != USER_DEFINED} for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
          if kind in (UNKNOWN, CONTROL, USER_DEFINED)]


def _unigram(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *,
             normalizers: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The tokenizer.json of a SentencePiece unigram model."""
  table = [[piece, _NEVER if kind == UNUSED else score] for piece, score, kind in zip(pieces, scores, kinds, strict=True)]
  unknown = _unknown(pieces, kinds)
  model = {'type': 'Unigram', 'unk_id': None if unknown is None else pieces.index(unknown), 'vocab': table,
           'byte_fallback': BYTE in kinds}
  # The table finds every piece in the text, '</s>' too: it must not see one whole.
  hidden = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind in (UNKNOWN, CONTROL, BYTE)]
  starts = '|'.join(f'{re.escape(piece[0])}(?={re.escape(piece[1:])})' for piece in hidden)
  cut = {'type': 'Split', 'pattern': {'Regex': starts}, 'behavior': 'Isolated', 'invert': False}
  return _spec(model, pieces, kinds, normalizers) | {'pre_tokenizer': cut if hidden else None}


def _spec(model: dict[str, Any], pieces: Sequence[str], kinds: Sequence[int],
          normalizers: Sequence[dict[str, Any]]) -> dict[str, Any]:
  spaces, back = _replace({'String': ' '}, SPACE), _replace({'String': SPACE}, ' ')
  return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added_tokens(pieces, kinds),
          'normalizer': {'type': 'Sequence', 'normalizers': [*normalizers, spaces]},
          'pre_tokenizer': None, 'post_processor': None,
          'decoder': {'type': 'Sequence', 'decoders': [back, {'type': 'ByteFallback'}, {'type': 'Fuse'}]}, 'model': model}


def _normalizers(rules: Any) -> list[dict[str, Any]]:
  """What a `NormalizerSpec` does to a text, but for the spaces at its ends: those stay."""
  charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
  mapped = [{'type': 'Precompiled', 'precompiled_charsmap': charsmap}] if charsmap else []
  return mapped + ([_replace({'Regex': ' {2,}'}, ' ')] if rules.remove_extra_whitespaces else [])


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
  return {'type': 'Replace', 'pattern': pattern, 'content': content}


def _unknown(pieces: Sequence[str], kinds: Sequence[int]) -> str | None:
  return next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
