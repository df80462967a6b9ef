"""CALRec as a model of T5X: its trainer, partitioner, checkpoints and logs drive the losses of `two_tower.py`.

Only this module imports T5X, and nothing of the package imports it: gin/t5x/*.gin names it. What differs from `calrec train`
is T5X's: rows come from the SeqIO Task through `CalRecFeatureConverter`, so `targets = 'all'` writes each prefix out; all
weights are trained, in float32; a run that goes on after a stop does not read the batches that it would have read.

Axes: B rows, L joint length, P prefix length, T tokens of a target with its end, D embed, V vocabulary; N samples of each row,
R = B · N.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from flax import core as flax_core
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning
from t5x import gin_utils, models, optimizers
from t5x import metrics as t5x_metrics

from calrec_jax import outputs, provenance
from calrec_jax.errors import UserError
from calrec_jax.models import decoding
from calrec_jax.models.decoder import Decoder
from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.head import BLOCK
from calrec_jax.models.losses import Objective
from calrec_jax.models.two_tower import Batch, Terms, TwoTower
from calrec_jax.tasks import registry
from calrec_jax.text.feature_converters import CalRecFeatureConverter, batch_slots
from calrec_jax.text.rows import Shapes
from calrec_jax.text.vocabularies import TokenizerVocabulary
from calrec_jax.training import checkpoints, gradient_cache, partitioning
from calrec_jax.training.inputs import Inputs
from calrec_jax.training.optimizer import Optimizer
from calrec_jax.training.train_step import init_params
from calrec_jax.training.trainer import with_vocabulary

_T5X_KNOWS = ('batch', 'vocab', 'embed', 'mlp', 'heads', 'kv', 'length', 'layers')  # axes of its standard rules
_PADDING = 0  # what T5X expects after a text's end


def additional_axis_rules() -> list[tuple[str, str | None]]:
  """The logical axes that T5X's standard rules lack, for `standard_logical_axis_rules`: its mesh has no `fsdp` axis."""
  return [(name, axes if axes == 'model' else None) for name, axes in partitioning.AXIS_RULES.items() if name not in _T5X_KNOWS]


def learning_rate(optimizer: Optimizer, train_steps: int) -> optax.Schedule:
  """What T5X logs as the rate; the update itself has it from `optimizer_def`."""
  return optimizer.rate(train_steps)


def optimizer_def(optimizer: Optimizer, train_steps: int) -> optimizers.OptimizerDef:
  """The update rule of `calrec train`, as T5X holds it. Raises UserError for an option that T5X has no place for."""
  for name, wanted in (('name', 'adamw'), ('state_dtype', 'float32'), ('average_decay', 0.0)):
    if getattr(optimizer, name) != wanted:
      raise UserError(f'optimizer.{name} = {getattr(optimizer, name)!r}: under T5X it is {wanted!r}; leave it out, or use '
                      '`calrec train`.')
  return optimizers.OptaxWrapper(optimizer.build(train_steps))


def summarize(model_dir: str, summary_writer: Any, step: int, *, inputs: Inputs, decoder: DecoderConfig,
              initial_checkpoint: str | Sequence[str] = ()) -> None:
  """T5X's record of a run's configuration, and beside it what `calrec import` needs: the vocabulary, and a description.

  `initial_checkpoint`, if there is one, says which pretrained model the run goes back to.
  """
  gin_utils.summarize_gin_config(model_dir, summary_writer, step)
  if jax.process_index():
    return
  folder = pathlib.Path(model_dir)
  before = pathlib.Path(initial_checkpoint).parent / checkpoints.T5X_DESCRIPTION_FILE if initial_checkpoint else None
  pretrained = outputs.read_object(before).get('pretrained') if before and before.exists() else None
  inputs.vocabulary.save(folder / checkpoints.VOCABULARY_FILE)
  outputs.write_json(folder / checkpoints.T5X_DESCRIPTION_FILE, {
      'decoder': with_vocabulary(decoder, inputs).shape(), **inputs.text_description(), 'data': None,
      'pretrained': pretrained, 'gin': gin_utils.get_gin_config_str(), 'versions': provenance.versions()})


class CALRecModel(models.BaseTransformerModel):
  """The two towers and their losses, as T5X calls them.

  The batch is that of `CalRecFeatureConverter`. As InfoNCE compares the spans of the whole batch, and L_NIG is a mean over it,
  the loss is that of `calrec train`, a mean and not T5X's sum, and `Trainer.num_microbatches` cannot be used: `microbatches`
  here can.
  """

  def __init__(self, inputs: Inputs, decoder: DecoderConfig, objective: Objective,
               optimizer_def: optimizers.OptimizerDef | None = None, *, targets: str = 'last', spans_per_row: int = 16,
               alone_length: int | None = None, head_block: int = BLOCK, microbatches: int = 1, n_samples: int = 1,
               temperature: float = 0.0, max_new_tokens: int | None = None):
    """Registers the Tasks of `inputs`' histories folders, and their Mixture, as well.

    Args:
      inputs: the data, its vocabulary and lengths.
      decoder: the decoder's shape.
      objective: weights and options of the losses.
      optimizer_def: None where nothing is trained.
      targets: spans of the train split: `last` item of a history, or `all` after the first.
      spans_per_row, alone_length: of packed rows, see `CalRecFeatureConverter`.
      head_block: see `head`.
      microbatches: parts in which a training batch is computed, with the gradient of the whole, see `gradient_cache`.
      n_samples: texts that are sampled for each prefix; the most probable one is the prediction.
      temperature: of sampling; 0: the most probable token, always.
      max_new_tokens: of a text with its end. None: as many as a target may have.

    Raises:
      UserError: an option that does not hold under T5X, no such data.
    """
    if decoder.lora_rank:
      raise UserError(f'decoder.lora_rank = {decoder.lora_rank}: under T5X all weights are trained; use `calrec train`.')
    if decoder.param_dtype != 'float32':
      raise UserError(f"decoder.param_dtype = {decoder.param_dtype!r}: under T5X it is 'float32'; use `calrec train`.")
    if n_samples < 1 or temperature < 0 or (n_samples > 1 and temperature == 0):
      raise UserError(f'CALRecModel.n_samples = {n_samples}, temperature = {temperature}: give at least 1 sample, and for more '
                      'than 1 a temperature above 0.')
    registry.register(inputs.data_dir, inputs.vocabulary, template=inputs.template, targets=targets,
                      mixture_names=inputs.mixture, exponent=inputs.exponent)
    vocabulary = inputs.vocabulary
    self.FEATURE_CONVERTER_CLS = functools.partial(  # T5X's name for it
        CalRecFeatureConverter, vocabulary, spans_per_row=spans_per_row, alone_length=alone_length)
    self._microbatches, self._train_rows = microbatches, None
    self._n_samples, self._temperature, self._max_new_tokens = n_samples, temperature, max_new_tokens
    module = TwoTower(Decoder(with_vocabulary(decoder, inputs)), objective, bos=vocabulary.bos_id is not None,
                      head_block=head_block)
    super().__init__(module, input_vocabulary=vocabulary, output_vocabulary=vocabulary, optimizer_def=optimizer_def)

  def get_initial_variables(self, rng: jax.Array, input_shapes: Mapping[str, tuple[int, ...]],
                            input_types: Mapping[str, jnp.dtype] | None = None) -> flax_core.FrozenDict:
    """`params`, drawn at random, and `params_axes`, their logical axis names in the form that T5X's partitioner reads."""
    del input_types
    self._train_rows, L = input_shapes['tokens']
    shapes = Shapes(B=1, L=L, M=input_shapes['alone_tokens'][1], E=1, S=1)
    boxed = traverse_util.flatten_dict(init_params(self.module, rng, shapes))
    axes = {(*path[:-1], f'{path[-1]}_axes'): flax_partitioning.AxisMetadata(leaf.names) for path, leaf in boxed.items()}
    params = {path: leaf.unbox(apply_constraint=False) for path, leaf in boxed.items()}
    return flax_core.freeze({'params': traverse_util.unflatten_dict(params), 'params_axes': traverse_util.unflatten_dict(axes)})

  def loss_fn(self, params: Any, batch: Batch, dropout_rng: jax.Array | None) -> tuple[jax.Array, t5x_metrics.MetricsMap]:
    """The loss, nats, and its terms as metrics; without `dropout_rng` there is no dropout.

    Raises UserError where T5X has cut the batch.
    """
    if dropout_rng is not None and len(batch['tokens']) != self._train_rows:
      raise UserError(f'Trainer.num_microbatches: {len(batch["tokens"])} of {self._train_rows} rows have no loss of their own, '
                      'for the spans of a batch are compared with each other; leave it None, and set CALRecModel.microbatches.')
    if dropout_rng is None:
      loss, terms = self.module.apply({'params': params}, of_batch(batch))
    elif self._microbatches > 1:
      loss, terms = self._loss_in_parts(params, of_batch(batch), dropout_rng)
    else:
      loss, terms = self.module.apply({'params': params}, of_batch(batch), train=True, rngs={'dropout': dropout_rng})
    return loss, as_metrics(terms)

  def _loss_in_parts(self, params: Any, batch: Batch, dropout_rng: jax.Array) -> tuple[jax.Array, Terms]:
    """The loss and its terms, whose gradient in the parameters comes from `gradient_cache`."""
    def forward(params: Any) -> tuple[tuple[jax.Array, Terms], Any]:
      gradients, terms = gradient_cache.gradients(self.module, lambda params: params, params, batch, dropout_rng,
                                                  self._microbatches)
      return (terms['loss'], terms), gradients
    loss = jax.custom_vjp(lambda params: forward(params)[0])
    loss.defvjp(forward, lambda gradients, slopes: (jax.tree.map(lambda g: g * slopes[0], gradients),))
    return loss(params)

  def predict_batch_with_aux(self, params: Any, batch: Batch, rng: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """The text that follows each row's prefix: ids, int32 [B, T], with the end and zeros after it.

    With `scores`, its log-probability at temperature 1, float32 [B]; and of all samples, most probable first, `samples`
    [B, N, T] and `sample_scores` [B, N]. Rows must not be packed.
    """
    lengths_B = _prefix_lengths(batch)
    vocabulary, T = self.output_vocabulary, self._max_new_tokens or self._longest_target(batch)
    tokens_BNT, logprobs_BN = generate(
        self.module.decoder, flax_core.unfreeze(params)['decoder'], batch['tokens'], lengths_B, rng, bos=self.module.bos,
        n_samples=self._n_samples, temperature=self._temperature, max_new_tokens=T, eos_id=vocabulary.eos_id,
        allowed_V=writable(vocabulary, self.module.decoder.config.vocab_size))
    order_BN = jnp.argsort(-logprobs_BN, axis=1, stable=True)
    logprobs_BN = jnp.take_along_axis(logprobs_BN, order_BN, axis=1)
    tokens_BNT = jnp.take_along_axis(tokens_BNT, order_BN[..., None], axis=1)
    return tokens_BNT[:, 0], {'scores': logprobs_BN[:, 0], 'samples': tokens_BNT, 'sample_scores': logprobs_BN}

  def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> Any:
    """log P(target and its end | prefix), nats, float32 [B]; rows must not be packed.

    With `return_intermediates` also v_U, v_T|U and v_T, float32 [B, D], as `user`, `context` and `target`.
    """
    lengths_B, T = _prefix_lengths(batch), self._longest_target(batch)
    at_BT = lengths_B[:, None] - 1 + jnp.arange(T)[None]
    pick = lambda x_BL: jnp.take_along_axis(x_BL, at_BT, axis=1, mode='fill', fill_value=0)
    hidden_BLD = self.module.apply({'params': params}, batch, method=TwoTower.joint)
    hidden_BTD = jnp.take_along_axis(hidden_BLD, at_BT[..., None], axis=1, mode='fill', fill_value=0)
    logits_BTV = self.module.decoder.apply({'params': params['decoder']}, hidden_BTD, method='logits')
    scores_B = jnp.sum(pick(batch['loss_weights']) * _chosen_logprobs(logits_BTV, pick(batch['labels'])), axis=1)
    if not return_intermediates:
      return scores_B
    towers = self.module.apply({'params': params}, of_batch(batch), method=TwoTower.embed)
    return scores_B, {'user': (towers.user_BED[:, 0],), 'context': (towers.context_BED[:, 0],),
                      'target': (towers.target_BED[:, 0],)}

  def _compute_logits(self, params: Any, batch: Batch, dropout_rng: jax.Array | None = None) -> jax.Array:
    """float32 [B, L, V]: of the token that follows each one of a row. The losses do not come here: they need few of them."""
    hidden_BLD = self.module.apply({'params': params}, batch, train=dropout_rng is not None, method=TwoTower.joint,
                                   rngs=None if dropout_rng is None else {'dropout': dropout_rng})
    return self.module.decoder.apply({'params': params['decoder']}, hidden_BLD, method='logits')

  def _longest_target(self, batch: Batch) -> int:
    """Tokens of a target with its end: rows that are not packed have as many alone positions, but for BOS and the end."""
    return batch['alone_tokens'].shape[1] - self.module.bos + 1


def of_batch(batch: Batch) -> Batch:
  """A batch of converted rows as the two towers read it: slots are counted over the batch."""
  return {**batch, 'span_slots': batch_slots(batch['span_slots'], batch['slot_texts'].shape[1])}


def as_metrics(terms: Terms) -> t5x_metrics.MetricsMap:
  """The loss and its terms for T5X's logs. Over several batches each term is a mean over what the batches' are means over."""
  average = lambda name, count: clu_metrics.Average(total=terms[name] * terms[count], count=terms[count])
  counts = {'nig': 'target_tokens', **dict.fromkeys(('tt', 'tt_accuracy', 'ut', 'ut_accuracy'), 'spans')}
  return {
      'loss': t5x_metrics.AveragePerStep(total=terms['loss']), **{name: average(name, count) for name, count in counts.items()},
      **{name: t5x_metrics.AveragePerStep(total=terms[name]) for name in ('spans', 'target_tokens', 'tokens')},
      'timing/steps_per_second': t5x_metrics.StepsPerTime.from_model_output(),
      'timing/tokens_per_second': t5x_metrics.TimeRate.from_model_output(numerator=terms['tokens']),
      'timing/seconds': t5x_metrics.Time()}


def generate(decoder: Decoder, params: Mapping, tokens_BP: jax.Array, lengths_B: jax.Array, rng: jax.Array | None, *, bos: bool,
             n_samples: int, temperature: float, max_new_tokens: int, eos_id: int,
             allowed_V: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Continues each prefix n_samples times, in one program, as T5X's inference step has to be.

  Args:
    decoder: the model.
    params: its parameters.
    tokens_BP: int32, prefixes, with any tokens after them.
    lengths_B: int32, tokens of each prefix.
    rng: of the sampling; None: a fixed one.
    bos: whether a prefix begins with one.
    n_samples, temperature: as in `CALRecModel`.
    max_new_tokens: T, the end included.
    eos_id: the end.
    allowed_V: bool, ids that may be written; the others count in the log-probabilities, as in training.

  Returns:
    (int32 [B, N, T], zeros after the end; float32 [B, N], nats of each text and its end at temperature 1).
  """
  (B, N, T), rng = (len(lengths_B), n_samples, max_new_tokens), jax.random.key(0) if rng is None else rng
  layers = decoding.by_layer(params)
  prefix = decoding.prefill(decoder, layers, tokens_BP, lengths_B, bos=bos)
  of = jax.tree.map(jnp.asarray, decoding.branches(np.repeat(np.arange(B), N), B, N))

  def write(state: tuple) -> tuple:
    place, hidden_RD, suffix, tokens_RT, logprobs_R, is_open_R = state
    logits_RV = decoding.logits(decoder, layers, hidden_RD)
    scores_RV = jnp.where(allowed_V[None], logits_RV, -jnp.inf)
    if temperature:
      new_R = jax.random.categorical(jax.random.fold_in(rng, place), scores_RV / temperature)
    else:
      new_R = jnp.argmax(scores_RV, axis=-1)
    logprobs_R += jnp.where(is_open_R, _chosen_logprobs(logits_RV, new_R), 0.0)
    tokens_RT = tokens_RT.at[:, place].set(jnp.where(is_open_R, new_R, _PADDING).astype(jnp.int32))
    hidden_R1D, suffix = decoding.extend(decoder, layers, new_R[:, None].astype(jnp.int32), prefix, suffix, of, place)
    return place + 1, hidden_R1D[:, 0], suffix, tokens_RT, logprobs_R, is_open_R & (new_R != eos_id)

  first = (jnp.zeros((), jnp.int32), jnp.repeat(prefix.last_UD, N, axis=0), decoding.empty_suffix(decoder, B * N, T),
           jnp.full((B * N, T), _PADDING, jnp.int32), jnp.zeros(B * N), jnp.ones(B * N, bool))
  goes_on = lambda state: (state[0] < T) & jnp.any(state[-1])
  _, _, _, tokens_RT, logprobs_R, _ = jax.lax.while_loop(goes_on, write, first)
  return tokens_RT.reshape(B, N, T), logprobs_R.reshape(B, N)


def writable(vocabulary: TokenizerVocabulary, vocab_size: int) -> np.ndarray:
  """bool [V]: ids of tokens, without BOS and padding (of a vocabulary that has none, id 0 is a token like others)."""
  allowed_V = np.arange(vocab_size) < vocabulary.vocab_size
  for special in {vocabulary.bos_id, vocabulary.pad_id} - {None, vocabulary.eos_id}:
    allowed_V[special] = bool(vocabulary.decode([special]))
  return allowed_V


def _chosen_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """log p of the tokens [...], by logits [..., V]."""
  return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def _prefix_lengths(batch: Batch) -> jax.Array:
  """int32 [B]: tokens before each row's target, whose first token is the first that has a loss."""
  if batch['span_texts'].shape[1] != 1:
    raise ValueError('Packed rows hold several prefixes; set DatasetConfig.pack = False.')
  return jnp.argmax(batch['loss_weights'] != 0, axis=1).astype(jnp.int32) + 1
