"""Perplexity of a pretrained model on a catalogue's item texts, here and in transformers, from one GGUF file.

The peer is transformers with its own reader of the file, float32, on the same tokens. The ratio is our perplexity over its; it
should be within 0.01 % of 1. Prints one JSON object as its last line.

  python benchmarks/pretrained_perplexity.py --from MODEL.gguf --data HISTORIES_FOLDER [--quick]

Over half an hour on two CPU cores for 135 M parameters and the 4,385 items of scientific2018; `--quick` takes 64 of them.
"""

import argparse
import json
import math
import pathlib
import tempfile
import time

import numpy as np

from calrec_jax.data import histories
from calrec_jax.inference import loading, score
from calrec_jax.inference.generate import padded
from calrec_jax.pretrained.importing import import_model
from calrec_jax.text.templates import ItemTemplate


def batches(rows: list[list[int]], size: int) -> list[list[list[int]]]:
  """Rows of similar length together; a batch's longest is its last."""
  ordered = sorted(rows, key=len)
  return [ordered[start:start + size] for start in range(0, len(ordered), size)]


def real(tokens_BL: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
  """bool [B, L]: which tokens are no padding."""
  return np.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]


def ours(loaded: loading.Loaded, rows: list[list[int]]) -> float:
  """Nats over all tokens but each row's first."""
  total = 0.0
  for batch in batches(rows, 16):
    tokens_BL, lengths_B = padded(batch, -(-len(batch[-1]) // 32) * 32)
    logprobs_BL = np.asarray(score.token_logprobs(loaded.decoder, loaded.params, tokens_BL, lengths_B), np.float64)
    total -= logprobs_BL[real(tokens_BL, lengths_B)[:, 1:]].sum()
  return total


def theirs(path: pathlib.Path, rows: list[list[int]]) -> float:
  import torch
  import transformers
  model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
  total = 0.0
  with torch.inference_mode():
    for batch in batches(rows, 16):
      tokens_BL, lengths_B = padded(batch, len(batch[-1]))
      tokens_BL, real_BL = map(torch.from_numpy, (tokens_BL, real(tokens_BL, lengths_B)))
      logits_BLV = model(tokens_BL.long(), attention_mask=real_BL.long()).logits[:, :-1]
      chosen_BL = torch.gather(torch.log_softmax(logits_BLV, -1), 2, tokens_BL[:, 1:, None].long())[..., 0]
      total -= chosen_BL[real_BL[:, 1:]].double().sum().item()
  return total


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--from', dest='source', required=True, type=pathlib.Path, help='GGUF file')
  parser.add_argument('--data', required=True, help='histories folder')
  parser.add_argument('--quick', action='store_true', help='64 items')
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    import_model(options.source, f'{folder}/model')
    loaded = loading.load(f'{folder}/model', dtype='float32')
  items = histories.load(options.data).items
  texts = [' ' + ItemTemplate().item_text(item) for item in items[:64 if options.quick else None]]
  rows = loaded.vocabulary.encode_batch(texts)
  count = sum(len(row) - 1 for row in rows)
  began = time.monotonic()
  here = ours(loaded, rows)
  between = time.monotonic()
  there = theirs(options.source, rows)
  perplexity, peer = math.exp(here / count), math.exp(there / count)
  print(json.dumps({'name': 'pretrained_perplexity', 'peer': 'transformers', 'ratio': perplexity / peer,
                    'perplexity': perplexity, 'peer_perplexity': peer, 'tokens': count, 'items': len(rows),
                    'seconds': [round(between - began, 1), round(time.monotonic() - between, 1)]}))


if __name__ == '__main__':
  main()
