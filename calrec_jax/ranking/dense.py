"""Dense retrieval: items by the cosine of their text's embedding v_T and the user's v_U."""

import numpy as np

_BLOCK = 256  # users at a time


def _unit(x_ND: np.ndarray) -> np.ndarray:
  return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)


def better_and_tied(users_ND: np.ndarray, texts_TD: np.ndarray, items_T: np.ndarray,
                    targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """How many items of a catalogue lie above each user's target, and how many others at its score: int64 [N] each.

  A score is computed once a text, so that items with one text are tied exactly.

  Args:
    users_ND: float32, embeddings of users.
    texts_TD: float32, embeddings of texts.
    items_T: how many items have each text.
    targets_N: the target's text, one with an item.
  """
  better, tied = np.zeros(len(users_ND), np.int64), np.zeros(len(users_ND), np.int64)
  texts = np.flatnonzero(items_T)
  columns, counts = _unit(texts_TD[texts]).T, items_T[texts]
  for start in range(0, len(users_ND), _BLOCK):
    block = slice(start, start + _BLOCK)
    scores = _unit(users_ND[block]) @ columns
    own = np.take_along_axis(scores, np.searchsorted(texts, targets_N[block])[:, None], axis=1)
    better[block] = (scores > own) @ counts
    tied[block] = (scores == own) @ counts - 1
  return better, tied
