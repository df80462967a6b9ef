"""What lists are like, whatever the targets: how much of the catalogue they show, how popular, how new it is."""

import numpy as np

CUT = 10


def beyond_accuracy(tops_UK: np.ndarray, *, contexts: list[np.ndarray], targets_U: np.ndarray, counts_I: np.ndarray
                    ) -> dict[str, float]:
  """Properties of the lists of all users, each over its first 10 items.

  - `coverage@10`: the share of the catalogue that is in some list.
  - `popularity@10`: the mean count of listed items over the mean count of the targets; above 1 a ranker prefers what is popular
    more than shoppers do. None where no target was ever bought before.
  - `repeats@10`: the share of listed items that the user has bought before.
  - `novelty@10`: the mean of −log2((count + 1) / (events + items)) of listed items, in bits: their self-information (Castells,
    Vargas and Wang 2011), with one event more for each item, so that new items have a finite one.

  Args:
    tops_UK: int [U, K], item numbers, the best first; -1 where a list is shorter. Items of one score are in an order by a hash.
    contexts: each user's items before the target.
    targets_U: int.
    counts_I: int, events of each item in the train parts.
  """
  tops_UK = tops_UK[:, :CUT]
  listed_UK = tops_UK >= 0
  listed = tops_UK[listed_UK]
  targets = counts_I[targets_U].mean()
  repeated_UK = np.stack([np.isin(top_K, context) for top_K, context in zip(tops_UK, contexts, strict=True)])
  information_I = -np.log2((counts_I + 1) / (counts_I.sum() + len(counts_I)))
  return {
    f'coverage@{CUT}': len(np.unique(listed)) / len(counts_I),
    f'popularity@{CUT}': float(counts_I[listed].mean() / targets) if targets else None,
    f'repeats@{CUT}': float(repeated_UK[listed_UK].mean()),
    f'novelty@{CUT}': float(information_I[listed].mean()),
  }
