"""An index whose items are not those of the data set."""

from collections.abc import Iterator

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.audit.findings import NOTE, Finding, finding, item_label
from calrec_jax.evaluation.audit.folders import Folder
from calrec_jax.ranking.index import read_catalogue

CHECK = 'catalogue of an index'


def check_index(dataset: Histories, folder: Folder) -> Iterator[Finding]:
  """Notes of items that only one of the two has, and of those whose attributes differ. Raises UserError for a broken index."""
  ids, items = read_catalogue(folder.path / 'items.jsonl.gz')
  there, here = dict(zip(ids, items, strict=True)), dict(zip(dataset.item_ids, range(len(dataset.item_ids)), strict=True))
  missing = [number for item_id, number in here.items() if item_id not in there]
  more = [item_id for item_id in ids if item_id not in here]
  other = [number for item_id, number in here.items() if there.get(item_id, dataset.items[number]) != dataset.items[number]]
  if missing:
    yield finding(CHECK, NOTE, f'{folder.path} lacks {len(missing)} of {len(here)} items of {dataset.name}: they cannot be '
                  'recommended.', len(missing), (item_label(dataset, number) for number in missing))
  if more:
    yield finding(CHECK, NOTE, f'{folder.path} has {len(more)} items that {dataset.name} lacks: they are ranked too.',
                  len(more), (f'{item_id} ({there[item_id]["title"] or "no title"})' for item_id in more))
  if other:
    yield finding(CHECK, NOTE, f'{folder.path} has other attributes than {dataset.name} for {len(other)} items.', len(other),
                  (item_label(dataset, number) for number in other))
