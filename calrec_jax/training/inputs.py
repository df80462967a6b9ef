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
    mixture: the data sets of `stage1_mixture`, by name; None: every histories folder in `data_dir`.
    exponent: a data set's rate in `stage1_mixture` is its number of users to this power, scaled to a sum of 1.
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
    names = self.mixture
    if names is not None and (isinstance(names, str) or not names or not all(isinstance(name, str) for name in names)):
      raise UserError(f"inputs.mixture = {names!r}: give names in brackets, such as ('gift_cards', 'shop'), a single one with "
                      "a comma, ('gift_cards',); None is every data set of DATA_DIR.")
    if not isinstance(self.exponent, int | float) or not -10 <= self.exponent <= 10:
      raise UserError(f'inputs.exponent = {self.exponent!r}: give a number from -10 to 10; the paper has 0.3.')

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

  def shares(self, sources: list[Source]) -> str:
    """A line for each data set, with its users and its rate: the share of histories that are drawn from it."""
    rows = [(source.histories.name, f'{len(source.histories.user_ids):,}', f'{source.rate:.4f}') for source in sources]
    names, users, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    rule = f', at rates (number of users)^{self.exponent:g}' if self.mixture_or_task_name == registry.STAGE1_MIXTURE else ''
    return '\n'.join([f'{self.mixture_or_task_name}: {len(rows)} data set{"s" * (len(rows) > 1)}{rule}',
                      *(f'  {name:{names}}  {count:>{users}} users  rate {rate}' for name, count, rate in rows)])

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
