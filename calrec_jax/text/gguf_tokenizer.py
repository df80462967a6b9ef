"""The tokenizer inside a GGUF file as `tokenizer.json`."""

from collections.abc import Mapping
from typing import Any

from calrec_jax.errors import UserError
from calrec_jax.text import sentencepiece_model

_LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r'|\s+(?!\S)|\s+')
_QWEN_2 = _LLAMA_3.replace(r'\p{N}{1,3}', r'\p{N}')


def _bytes(use_regex: bool) -> dict[str, Any]:
  return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': use_regex}


def _split(regex: str) -> dict[str, Any]:
  split = {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': 'Isolated', 'invert': False}
  return {'type': 'Sequence', 'pretokenizers': [split, _bytes(False)]}


# How text is cut before it is merged, by the name that llama.cpp gives it; as in the models' published tokenizer.json.
_PRE_TOKENIZERS = {
    'default': _bytes(True), 'gpt-2': _bytes(True), 'llama-bpe': _split(_LLAMA_3), 'qwen2': _split(_QWEN_2),
    'smollm': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, _bytes(True)]}}
_WHOLE_WORDS_FIRST = ('llama-bpe',)  # a word that is a token is taken as it is, whatever the merges
_NORMALIZED = ('qwen2',)


def read(metadata: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str | None, str | None]:
  """(the tokenizer.json, BOS where texts begin with one, EOS) of a GGUF file's metadata.

  Raises:
    UserError: a tokenizer of a kind that is not known.
  """
  get = lambda key, default=None: metadata.get(f'tokenizer.ggml.{key}', default)
  kind, tokens = get('model'), get('tokens')
  kinds = get('token_type') or [sentencepiece_model.NORMAL] * len(tokens or [])
  if kind == 'gpt2' and tokens:
    spec = _byte_level(tokens, kinds, get('merges', []), get('pre'), where)
  elif kind == 'llama' and tokens:
    spec = sentencepiece_model.bpe(tokens, get('scores', [0.0] * len(tokens)), kinds)
  else:
    raise UserError(f'{where}: its tokenizer is of the kind {kind!r}; known are gpt2 (byte-level BPE) and llama (SentencePiece '
                    'BPE): take the model\'s Hugging Face folder.')
  name = lambda key: None if get(key) is None else tokens[get(key)]
  adds_bos = get('add_bos_token', kind == 'llama' or get('pre') == 'llama-bpe')  # as llama.cpp does where the file is silent
  return spec, name('bos_token_id') if adds_bos else None, name('eos_token_id')


def _byte_level(tokens: list[str], kinds: list[int], merges: list[str], pre: str | None, where: str) -> dict[str, Any]:
  if pre not in _PRE_TOKENIZERS:
    raise UserError(f'{where}: its tokenizer cuts text as {pre!r}; known are {", ".join(_PRE_TOKENIZERS)}: take the model\'s '
                    'Hugging Face folder.')
  model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
           'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': pre in _WHOLE_WORDS_FIRST,
           'vocab': {token: i for i, token in enumerate(tokens)}, 'merges': [merge.split(' ', 1) for merge in merges]}
  return {'version': '1.0', 'truncation': None, 'padding': None,
          'added_tokens': sentencepiece_model.added_tokens(tokens, kinds),
          'normalizer': {'type': 'NFC'} if pre in _NORMALIZED else None, 'pre_tokenizer': _PRE_TOKENIZERS[pre],
          'post_processor': None, 'decoder': _bytes(True), 'model': model}
