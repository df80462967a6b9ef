"""CALRec in PyTorch, as one would write it first, with `transformers`: what `train_speed.py` measures against.

One example a prefix: a history's text up to a target, and the target. Two forward passes, history and target together, and the
target alone; cross-entropy and two InfoNCE losses. Plain: batches are padded to their longest, and the head runs over all
positions. Strong: nothing is padded (each example runs by itself, in one backward pass), and the head runs at targets only.
"""

import dataclasses
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from flax import traverse_util

from calrec_jax.models.decoder_config import DecoderConfig
from calrec_jax.models.losses import Objective
from calrec_jax.pretrained import families
from calrec_jax.pretrained.safetensors_files import write_shards
from calrec_jax.pretrained.tensors import tensors, view
from calrec_jax.text.corpus import Corpus, Excerpts


@dataclasses.dataclass(frozen=True)
class Example:
  """A prefix of a history with the target that follows: token ids, and the identity of the target's text."""

  history: np.ndarray
  target: np.ndarray
  text: int


def examples(corpus: Corpus, excerpts: Excerpts, chosen: np.ndarray) -> list[Example]:
  """Every target of the chosen excerpts, written out with the history before it."""
  piece = lambda start, length: corpus.bank[start:start + length]
  found = []
  for excerpt in chosen.tolist():
    start, first = excerpts.starts[excerpt], excerpts.first_targets[excerpt]
    tokens = []
    for event in range(start, excerpts.stops[excerpt]):
      item = corpus.events[event]
      tokens.append(piece(*(corpus.opener if event == start else corpus.next_prompt)))
      target = piece(corpus.item_starts[item], corpus.item_lengths[item])
      if event >= first:
        found.append(Example(np.concatenate(tokens), target, int(corpus.text_ids[item])))
      tokens.append(target)
  return found


def model(config: DecoderConfig, params: dict) -> transformers.PreTrainedModel:
  """The Hugging Face model with the weights of a decoder's parameter tree, float32."""
  _, keys = families.from_config(config)
  flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
  wanted = {tensor.name: tensor for tensor in tensors(config)}
  with tempfile.TemporaryDirectory() as folder:
    write_shards(pathlib.Path(folder), [(tensor.name, tensor.shape) for tensor in wanted.values()],
                 lambda name: view(flat, wanted[name]), 'float32', max_shard_bytes=10**10)
    made = transformers.AutoConfig.for_model(**keys)
    made.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Peer:
  """A model and its optimizer."""

  def __init__(self, config: DecoderConfig, params: dict, objective: Objective, eos: int, strong: bool):
    self.model, self.objective, self.eos, self.strong = model(config, params), objective, eos, strong
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01, betas=(0.9, 0.99))

  def losses(self, batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L_NIG, L_TT, L_UT of a batch."""
    nll, user, context, alone = (self._strong if self.strong else self._padded)(batch)
    texts = torch.tensor([example.text for example in batch])
    return nll, self._info_nce(context, alone, texts), self._info_nce(user, alone, texts)

  def step(self, batch: list[Example]) -> None:
    nig, tt, ut = self.losses(batch)
    self.optimizer.zero_grad()
    self.objective.total(nig, tt, ut).backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()

  def _info_nce(self, context: torch.Tensor, target: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    normal = torch.nn.functional.normalize
    logits = normal(context, dim=-1) @ normal(target, dim=-1).T / self.objective.temperature
    same = (texts[:, None] == texts[None, :]) & ~torch.eye(len(texts), dtype=torch.bool)
    return torch.nn.functional.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(texts)))

  def _padded(self, batch: list[Example]) -> tuple[torch.Tensor, ...]:
    joint, mask = _pad([np.concatenate([example.history, example.target]) for example in batch])
    outputs = self.model(joint, attention_mask=mask, output_hidden_states=True)
    hidden = outputs.hidden_states[-1]
    labels, user, context = torch.full_like(joint, -100), torch.zeros_like(hidden[..., 0]), torch.zeros_like(hidden[..., 0])
    for row, example in enumerate(batch):
      first, last = len(example.history), len(example.history) + len(example.target)
      labels[row, first - 1:last - 1] = torch.from_numpy(example.target.astype(np.int64))
      labels[row, last - 1] = self.eos
      user[row, :first], context[row, first:last] = 1 / first, 1 / (last - first)
    nll = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    texts, text_mask = _pad([example.target for example in batch])
    alone = self.model(texts, attention_mask=text_mask, output_hidden_states=True).hidden_states[-1]
    weights = text_mask / text_mask.sum(1, keepdim=True)
    pooled = lambda weights, hidden: torch.einsum('bl,bld->bd', weights, hidden)
    return nll, pooled(user, hidden), pooled(context, hidden), pooled(weights, alone)

  def _strong(self, batch: list[Example]) -> tuple[torch.Tensor, ...]:
    at_targets, labels, user, context, alone = [], [], [], [], []
    for example in batch:
      tokens = torch.from_numpy(np.concatenate([example.history, example.target]).astype(np.int64))[None]
      hidden, first = self.model.model(tokens).last_hidden_state[0], len(example.history)
      at_targets.append(hidden[first - 1:])
      labels += [*example.target.tolist(), self.eos]
      user.append(hidden[:first].mean(0))
      context.append(hidden[first:].mean(0))
      alone.append(self.model.model(torch.from_numpy(example.target.astype(np.int64))[None]).last_hidden_state[0].mean(0))
    nll = torch.nn.functional.cross_entropy(self.model.lm_head(torch.cat(at_targets)), torch.tensor(labels))
    return nll, torch.stack(user), torch.stack(context), torch.stack(alone)


def _pad(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
  """(token ids padded to the longest, mask), int64 [B, L]."""
  ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
  mask = torch.zeros_like(ids)
  for row, tokens in enumerate(rows):
    ids[row, :len(tokens)], mask[row, :len(tokens)] = torch.from_numpy(tokens.astype(np.int64)), 1
  return ids, mask
