"""What a run reads: a SeqIO Task or Mixture by name, as a corpus of tokens for each split."""

import dataclasses
from collections.abc import Mapping

from calrec_jax import storage
from calrec_jax.data import histories
from calrec_jax.errors import UserError
from calrec_jax.tasks import registry
from calrec_jax.text.corpus import Corpus, Source, build_corpus
from calrec_jax.text.item_tokens import load_item_tokens
from calrec_jax.text.templates import ItemTemplate
from calrec_jax.text.vocabularies import TokenizerVocabulary


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The data of a run.

  Attributes:
    data_dir: holds one histories folder a data set, `DATA_DIR/<name>`.
    mixture_or_task_name: a SeqIO Task (a data set's name) or Mixture.
    vocabulary: how text becomes tokens.
    template: how an item becomes text.
    task_feature_lengths: tokens of `inputs` (the history) and `targets` (one item, the cap of every item's text); a history
      holds both together.
  """

  data_dir: str
  mixture_or_task_name: str
  vocabulary: TokenizerVocabulary
  template: ItemTemplate
  task_feature_lengths: Mapping[str, int]
  mixture: tuple[str, ...] | None = None
  exponent: float = 0.3

  def __post_init__(self):
    lengths = self.task_feature_lengths
    if set(lengths) != {'inputs', 'targets'} or min(lengths.values()) < 1:
      raise UserError(f"TASK_FEATURE_LENGTHS = {dict(lengths)}: give 'inputs' and 'targets', both at least 1.")

  @property
  def length(self) -> int:
    """Most tokens of a history with its target."""
    return self.task_feature_lengths['inputs'] + self.task_feature_lengths['targets']

  @property
  def max_item_tokens(self) -> int:
    return self.task_feature_lengths['targets']

  def load(self) -> list[Source]:
    """The data sets of the Task or Mixture, with their item tokens and rates. Raises UserError for an unknown name."""
    if not storage.is_dir(self.data_dir):
      raise UserError(f'DATA_DIR = {self.data_dir}: no such folder; give the folder that holds the histories folders.')
    registry.register(self.data_dir, self.vocabulary, template=self.template, mixture_names=self.mixture,
                      exponent=self.exponent)
    sources = []
    for name, rate in registry.resolve(self.mixture_or_task_name):
      folder = storage.local(storage.join(self.data_dir, name))
      data = histories.load(folder)
      sources.append(Source(data, load_item_tokens(folder, data, self.template, self.vocabulary), rate))
    return sources

  def corpus(self, sources: list[Source], split: str) -> Corpus:
    """The corpus of one split."""
    return build_corpus(sources, template=self.template, vocabulary=self.vocabulary, split=split,
                        max_item_tokens=self.max_item_tokens)

  def text_description(self) -> dict:
    """What a checkpoint remembers of how its data became tokens."""
    return {
        'mixture_or_task_name': self.mixture_or_task_name, 'vocabulary': self.vocabulary.fingerprint,
        'template': {'fields': list(self.template.fields), 'unknown': self.template.unknown},
        'task_feature_lengths': dict(self.task_feature_lengths)}

  def description(self, sources: list[Source]) -> dict:
    """What a checkpoint remembers of its data."""
    return self.text_description() | {
        'data': {source.histories.name: source.histories.fingerprint for source in sources},
        'rates': {source.histories.name: float(source.rate) for source in sources}}
