"""SentencePiece models as `tokenizer.json`: pieces and scores become BPE merges, or a unigram table.

No space is put before a text: the pieces of a history are tokenized on their own, and must join to the whole text.
"""

import base64
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from calrec_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, in SentencePiece and in GGUF
SPACE = '▁'
_NEVER = -1e6  # the score of what text may not become
_BPE = 2  # trainer_spec.model_type; 1 is unigram


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
  if not model.pieces or model.trainer_spec.model_type not in (1, _BPE):
    raise UserError(f'{path}: no SentencePiece model of the kinds BPE or unigram; take another tokenizer.')
  if len(model.normalizer_spec.precompiled_charsmap):
    logging.warning('%s: its normalizer (%s) rewrites text before it is tokenized, so texts do not come back as they were.',
                    path, model.normalizer_spec.name)
  pieces, scores, kinds = zip(*((p.piece, p.score, p.type) for p in model.pieces), strict=True)
  charsmap = bytes(model.normalizer_spec.precompiled_charsmap)
  if model.trainer_spec.model_type == _BPE:
    spec = bpe(pieces, scores, kinds, charsmap=charsmap)
  else:
    spec = _unigram(pieces, scores, kinds, charsmap=charsmap)
  ends = [name if name in pieces else None for name in (model.trainer_spec.bos_piece, model.trainer_spec.eos_piece)]
  return spec, ends[0], ends[1]


def bpe(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], charsmap: bytes = b'') -> dict[str, Any]:
  """The tokenizer.json of a SentencePiece BPE: the best-scored merge first, wherever it stands in the text.

  Args:
    pieces: by id.
    scores: of each; the higher, the earlier is a pair merged to it.
    kinds: of each, as above.
    charsmap: the compiled normalizer, if there is one.
  """
  ids = {piece: i for i, piece in enumerate(pieces)}
  reached = [i for i, kind in enumerate(kinds) if kind in (NORMAL, USER_DEFINED) and not _is_added(pieces[i], kind)]
  usable = {pieces[i] for i in reached}
  merges = []
  for i in sorted(reached, key=lambda i: (-scores[i], i)):
    splits = [(pieces[i][:n], pieces[i][n:]) for n in range(1, len(pieces[i]))]
    merges += sorted((pair for pair in splits if usable.issuperset(pair)), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
  has_bytes = BYTE in kinds
  model = {'type': 'BPE', 'dropout': None, 'unk_token': _unknown(pieces, kinds), 'continuing_subword_prefix': None,
           'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': has_bytes, 'ignore_merges': False, 'vocab': ids,
           'merges': [list(pair) for pair in merges]}
  return _spec(model, pieces, kinds, charsmap)


def _unigram(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], charsmap: bytes) -> dict[str, Any]:
  """The tokenizer.json of a SentencePiece unigram model."""
  table = [[piece, float(score) if kind in (NORMAL, USER_DEFINED) else _NEVER]
           for piece, score, kind in zip(pieces, scores, kinds, strict=True)]
  unknown = _unknown(pieces, kinds)
  model = {'type': 'Unigram', 'unk_id': None if unknown is None else pieces.index(unknown), 'vocab': table,
           'byte_fallback': BYTE in kinds}
  return _spec(model, pieces, kinds, charsmap)


def _spec(model: dict[str, Any], pieces: Sequence[str], kinds: Sequence[int], charsmap: bytes) -> dict[str, Any]:
  mapped = [{'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(charsmap).decode()}] if charsmap else []
  spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
  back = {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}
  return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added_tokens(pieces, kinds),
          'normalizer': {'type': 'Sequence', 'normalizers': [*mapped, spaces]}, 'pre_tokenizer': None, 'post_processor': None,
          'decoder': {'type': 'Sequence', 'decoders': [back, {'type': 'ByteFallback'}, {'type': 'Fuse'}]}, 'model': model}


def added_tokens(pieces: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
  """Pieces that are found in the text before all others, or, if special, never."""
  return [{'id': i, 'content': piece, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
           'special': kind != USER_DEFINED} for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
          if _is_added(piece, kind)]


def _is_added(piece: str, kind: int) -> bool:
  """Runs of spaces are merged like other pieces, after spaces have become `SPACE`."""
  return kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and SPACE not in piece)


def _unknown(pieces: Sequence[str], kinds: Sequence[int]) -> str | None:
  return next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
