"""A tokenizer file as a SeqIO vocabulary: what text becomes which token ids, and back.

Vocabularies are `tokenizer.json` files of the `tokenizers` library: trained here on a catalogue (byte-level BPE in
which each fixed phrase of the template is one token), or from a pretrained model, whose SentencePiece model or GGUF file is
made into one.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf
import tokenizers

from calrec_jax import outputs, storage
from calrec_jax.errors import UserError
from calrec_jax.gguf_files import GgufFile
from calrec_jax.text import gguf_tokenizer, sentencepiece_model
from calrec_jax.text.templates import FIRST, NEXT, ItemTemplate

PAD, EOS = '<pad>', '</s>'  # ids 0 and 1 of a vocabulary trained here
BYTES = 256
_PAD_NAMES = (PAD, '[PAD]', '<|pad|>', '<|finetune_right_pad_id|>')
_FILES = ('tokenizer.json', 'tokenizer.model')  # of a folder
_BESIDE = ('tokenizer_config.json', 'generation_config.json', 'config.json')  # which may name EOS
_EOS_NAMES = (EOS, '<eos>', '<|endoftext|>', '<|end_of_text|>')


class TokenizerVocabulary(seqio.Vocabulary):
  """A `tokenizers.Tokenizer` as a `seqio.Vocabulary`. Special tokens are never read from text, nor written to it.

  Attributes:
    fingerprint: sha256 (hex) of the tokenizer's canonical JSON, which holds the special ids too; never of a path.
    bos_id: the id that starts a row, None where the vocabulary has none (as those trained here).
    pad_id: 0 where the vocabulary has no padding token; nothing may infer padding from it.
  """

  def __init__(self, spec: str):
    """Takes the text of a tokenizer.json whose post-processor names EOS, as `load_vocabulary` makes it."""
    super().__init__()
    self._spec = spec
    self._tokenizer = tokenizers.Tokenizer.from_str(spec)
    self._tokenizer.encode_special_tokens = True  # '</s>' in a title stays text
    parsed = json.loads(spec)
    bos, eos = _template_ends(parsed.get('post_processor'))
    self._bos_id = None if bos is None else self._tokenizer.token_to_id(bos)
    self._eos_id = self._tokenizer.token_to_id(eos)
    model = parsed['model']
    self._unk_id = model.get('unk_id', self._tokenizer.token_to_id(model.get('unk_token') or ''))
    self._pad_id = next((i for i in map(self._tokenizer.token_to_id, _PAD_NAMES) if i is not None), 0)
    self.fingerprint = hashlib.sha256(json.dumps(parsed, sort_keys=True).encode()).hexdigest()

  @property
  def bos_id(self) -> int | None:
    return self._bos_id

  @property
  def eos_id(self) -> int:
    return self._eos_id

  @property
  def unk_id(self) -> int | None:
    return self._unk_id

  @property
  def pad_id(self) -> int:
    return self._pad_id

  @functools.cached_property
  def _base_vocab_size(self) -> int:
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without BOS or EOS, on all cores."""
    return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

  def _encode(self, s: str) -> list[int]:
    return self._tokenizer.encode(s, add_special_tokens=False).ids

  def _decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text: np.ndarray | bytes) -> np.ndarray:  # an array of rank 0 when eager, bytes in a graph
      return np.array(self.encode(np.asarray(text, object).item().decode()), np.int32)
    ids = tf.numpy_function(encode, [s], tf.int32)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(batch: np.ndarray) -> np.ndarray:
      texts = [self.decode(row).encode() for row in batch.reshape(-1, batch.shape[-1]).tolist()]
      return np.array(texts, object).reshape(batch.shape[:-1])
    texts = tf.numpy_function(decode, [ids], tf.string)
    texts.set_shape(ids.shape[:-1])
    return texts

  def save(self, path: str | os.PathLike) -> None:
    """Writes the vocabulary as a tokenizer.json, whole or not at all; `load_vocabulary` gives an equal one."""
    with outputs.new_file(path) as scratch:
      scratch.write_text(self._spec, encoding='utf-8')

  def token(self, token_id: int) -> str:
    """What a token stands for, to be read; of a part of a letter the sign for an unknown one."""
    return self._tokenizer.decode([token_id], skip_special_tokens=False)

  def write_huggingface(self, folder: str | os.PathLike) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a folder, for transformers' `AutoTokenizer`.

    It gives the ids of `encode`, with BOS before them where there is one. (Beside a config.json of Qwen 2, transformers 5
    cuts text as Qwen's own tokenizer does, whatever is written here.)
    """
    name = self._tokenizer.id_to_token
    bos = None if self.bos_id is None else name(self.bos_id)
    spec = json.loads(self._spec) | {'post_processor': _post_processor(self._tokenizer, bos, None)}
    pads = self.pad_id not in (self.eos_id, self.bos_id) and not self.decode([self.pad_id])
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos, 'eos_token': name(self.eos_id),
              'pad_token': name(self.pad_id if pads else self.eos_id), 'clean_up_tokenization_spaces': False}
    outputs.write_json(pathlib.Path(folder) / 'tokenizer_config.json', config)
    with outputs.new_file(pathlib.Path(folder) / 'tokenizer.json') as scratch:
      scratch.write_text(json.dumps(spec, ensure_ascii=False), encoding='utf-8')

  def __eq__(self, other: object) -> bool:
    return isinstance(other, TokenizerVocabulary) and self.fingerprint == other.fingerprint

  def __hash__(self) -> int:
    return hash(self.fingerprint)

  def __reduce__(self):
    return TokenizerVocabulary, (self._spec,)

  def __repr__(self) -> str:
    return f'TokenizerVocabulary(size={self.vocab_size}, fingerprint={self.fingerprint[:12]})'


def load_vocabulary(path: str | os.PathLike, *, eos_token: str | None = None,
                    bos_token: str | None = None) -> TokenizerVocabulary:
  """Reads a vocabulary: one written by `TokenizerVocabulary.save`, or a pretrained model's.

  A space that the tokenizer would put before each text is switched off: the pieces of a history are tokenized on their
  own, and must join to the whole text.

  Args:
    path: a tokenizer.json, a SentencePiece `*.model`, a `*.gguf`, or a folder that holds a `tokenizer.json` or
      `tokenizer.model`.
    eos_token: the text of the end token. None: the one that the file puts at the end of a text, else that of
      `tokenizer_config.json`, `generation_config.json` or `config.json` beside it, else a usual name.
    bos_token: the text of the token that starts a row; '' for none. None: the one that the file puts there, if any.

  Raises:
    UserError: no such file, no tokenizer in it, or a token that it does not have.
  """
  path = _file(storage.local(path, files=(*_FILES, *_BESIDE)))
  spec, bos, eos = _read(path)
  try:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as error:  # the Rust library raises bare `Exception`s
    raise UserError(f'{path}: not a tokenizer.json of the `tokenizers` library ({error}).') from error
  special = [token['content'] for token in spec.get('added_tokens') or [] if token['special']]
  bos = bos if bos_token is None else bos_token or None
  eos = eos_token or eos or _model_eos(path, tokenizer) or next((name for name in _EOS_NAMES if name in special), None)
  if eos is None:
    raise UserError(f'{path}: which token ends a text is not known; name it as eos_token, one of {special}.')
  for name in filter(None, (bos, eos)):
    if tokenizer.token_to_id(name) is None:
      raise UserError(f'{path}: has no token {name!r}; its special tokens are {special}.')
  return _vocabulary(spec, bos=bos, eos=eos)


def train_vocabulary(texts: Iterable[str], *, size: int, phrases: Sequence[str]) -> TokenizerVocabulary:
  """Trains byte-level BPE on `texts`: decode(encode(x)) == x for every x, and each phrase is one token.

  No merge crosses a phrase. Deterministic: the same texts, size and phrases give the same fingerprint.

  Args:
    texts: item texts, as the template writes them.
    size: tokens in all; fewer when the texts hold too little for as many.
    phrases: fixed phrases of the template (`template_phrases`).

  Raises:
    UserError: `size` is too small for the bytes, the phrases, PAD and EOS.
  """
  phrases = sorted(set(phrases), key=lambda phrase: (-len(phrase), phrase))
  smallest = BYTES + 2 + len(phrases)
  if size < smallest:
    raise UserError(f'A vocabulary of {size} tokens is too small: {BYTES} bytes, {len(phrases)} phrases, {PAD} and '
                    f'{EOS} need {smallest}.')
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = byte_level
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=size - len(phrases), special_tokens=[PAD, EOS], initial_alphabet=byte_level.alphabet(),
      show_progress=False)
  boundary = re.compile('|'.join(map(re.escape, phrases)) or r'(?!)')
  tokenizer.train_from_iterator((part for text in texts for part in boundary.split(text) if part), trainer)
  tokenizer.add_tokens([tokenizers.AddedToken(phrase, special=False, normalized=False) for phrase in phrases])
  return _vocabulary(json.loads(tokenizer.to_str()), bos=None, eos=EOS)


def template_phrases(template: ItemTemplate) -> list[str]:
  """The fixed phrases between the values of a history's text: the prompts, the fields' names, the absence of a value.

  With the default template ' Title: A. Category: B. Brand: Unknown. Price: Unknown.' is cut into ' Title:', the tokens
  of ' A', '. Category:', those of ' B', '. Brand: Unknown' and '. Price: Unknown.'.
  """
  names = [field.capitalize() for field in template.fields]
  phrases = [FIRST, NEXT] + [f' {name}:' for name in names] + [f'. {name}:' for name in names[1:]]
  if template.unknown == 'write':
    phrases += [f' {names[0]}: Unknown'] + [f'. {name}: Unknown' for name in names[1:]]
    phrases += [f'. {names[-1]}: Unknown.'] if names[1:] else []
  return phrases


def _file(path: pathlib.Path) -> pathlib.Path:
  """The file that holds the vocabulary of a folder."""
  if not path.is_dir():
    return path
  return next((path / name for name in _FILES if (path / name).exists()), path / _FILES[0])


def _read(path: pathlib.Path) -> tuple[dict, str | None, str | None]:
  """(a tokenizer.json, BOS where texts begin with one, EOS) of a file of any kind."""
  if path.suffix == '.gguf':
    return gguf_tokenizer.read(GgufFile(path).metadata, str(path))
  config = _beside(path, _BESIDE[0])
  eos = config.get('eos_token')
  config_eos = eos.get('content') if isinstance(eos, dict) else eos
  if path.suffix == '.model':
    spec, bos, eos = sentencepiece_model.read(path)
    return spec, bos if config.get('add_bos_token', True) else None, config_eos or eos
  try:
    spec = json.loads(path.read_text(encoding='utf-8'))
    bos, eos = _template_ends(spec.get('post_processor'))
  except OSError as error:
    raise UserError(f'{path}: the vocabulary cannot be read ({error.strerror}); give the path of a tokenizer.json.'
                    ) from error
  except (ValueError, AttributeError, KeyError, TypeError) as error:
    raise UserError(f'{path}: not a tokenizer.json of the `tokenizers` library ({error}).') from error
  return spec, bos, eos or config_eos


def _vocabulary(spec: dict, *, bos: str | None, eos: str) -> TokenizerVocabulary:
  """The vocabulary of a parsed tokenizer.json, cut-safe, with `bos` and `eos` written down in its post-processor.

  The JSON is edited, not written anew by the library: a fingerprint outlives the library's versions.
  """
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
  plain = _without_added_space(spec) | {'truncation': None, 'padding': None,
                                        'post_processor': _post_processor(tokenizer, bos, eos)}
  return TokenizerVocabulary(json.dumps(plain, ensure_ascii=False))


def _post_processor(tokenizer: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> dict | None:
  """The part of a tokenizer.json that writes BOS before a text and EOS after it."""
  text_a, text_b = ({'Sequence': {'id': name, 'type_id': 0}} for name in 'AB')
  before, after = ([{'SpecialToken': {'id': name, 'type_id': 0}}] if name else [] for name in (bos, eos))
  ends = {name: {'id': name, 'ids': [tokenizer.token_to_id(name)], 'tokens': [name]} for name in (bos, eos) if name}
  if not ends:
    return None
  return {'type': 'TemplateProcessing', 'single': [*before, text_a, *after], 'pair': [text_a, text_b], 'special_tokens': ends}


def _template_ends(processor: dict | None) -> tuple[str | None, str | None]:
  """(BOS, EOS): the tokens that a tokenizer.json's post-processor writes before and after a text, None where none."""
  if not processor:
    return None, None
  if processor['type'] == 'Sequence':
    ends = [_template_ends(part) for part in processor['processors']]
    return next((end for end in ends if end != (None, None)), (None, None))
  if processor['type'] != 'TemplateProcessing':
    return None, None
  names = [part.get('SpecialToken', {}).get('id') for part in processor['single']]
  text = names.index(None)
  return (names[0] if text else None), (names[-1] if text < len(names) - 1 else None)


def _model_eos(path: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> str | None:
  """The end token that the model's own files name by its id: the first, if there are several."""
  stated = (_beside(path, name).get('eos_token_id') for name in _BESIDE[1:])
  ids = next((ids for ids in stated if ids is not None), [])
  return next(map(tokenizer.id_to_token, ids if isinstance(ids, list) else [ids]), None)


def _beside(path: pathlib.Path, name: str) -> dict:
  """What the JSON file `name` beside `path` holds; {} if there is none."""
  try:
    held = json.loads(path.with_name(name).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return held if isinstance(held, dict) else {}


def _without_added_space(part: object) -> object:
  """A copy of a tokenizer.json's part in which nothing puts a space before a text, or takes it away again."""
  if isinstance(part, list):
    return [_without_added_space(child) for child in part if not _adds_space(child)]
  if not isinstance(part, dict):
    return part
  kept = {key: (value if key == 'model' else None if _adds_space(value) else _without_added_space(value))
          for key, value in part.items()}
  if part.get('type') == 'Metaspace':
    kept |= {'prepend_scheme': 'never'}
    kept.pop('add_prefix_space', None)
  elif 'add_prefix_space' in part:
    kept['add_prefix_space'] = False
  return kept


def _adds_space(part: object) -> bool:
  """Whether `part` is the normalizer that puts a space before a text, or the decoder that takes one away."""
  return isinstance(part, dict) and (
      part.get('type') == 'Prepend' or (part.get('type') == 'Strip' and part.get('content') == ' '))
