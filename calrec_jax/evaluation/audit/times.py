"""Time that runs backwards: inside a history, and between users."""

from collections.abc import Iterator

import numpy as np

from calrec_jax.data.histories import Histories
from calrec_jax.evaluation.audit.findings import NOTE, SERIOUS, Finding, finding, item_label, user_label
from calrec_jax.evaluation.audit.held_out import targets
from calrec_jax.evaluation.baselines.popularity import in_train, train_counts

ORDER, FUTURE = 'order of time', 'items of the future'
# Leave-one-out lets nearly every target come before some train event of another user, in any data set. That matters where it
# tells of items: where nobody had bought the target yet at its time, but the train parts hold it. Of an item that is sold n
# times in the train parts, evenly over time, that is so for one target in n + 1. It is told where so much more of them are.
MOST_MORE = 0.1


def check_order(dataset: Histories) -> Iterator[Finding]:
  """Finds histories in which an event is earlier than the one before it."""
  if dataset.timestamps is None or len(dataset.events) < 2:
    return
  users_E = dataset.event_users
  back = np.flatnonzero((np.diff(dataset.timestamps) < 0) & (users_E[1:] == users_E[:-1])) + 1
  if len(back):
    users, firsts = np.unique(users_E[back], return_index=True)
    yield finding(
        ORDER, SERIOUS, f'{len(users)} of {len(dataset.user_ids)} histories of {dataset.name} go back in time, so that targets '
        'are older than what they are predicted from. Order events by time; `calrec prepare` does.', len(users),
        (f'{user_label(dataset, user)}: {item_label(dataset, dataset.events[place])} at {dataset.timestamps[place]}, after '
         f'{dataset.timestamps[place - 1]}' for user, place in zip(users.tolist(), back[firsts].tolist(), strict=True)))


def check_future(dataset: Histories) -> Iterator[Finding]:
  """A note where test targets are items that train parts hold only at later times, `MOST_MORE` oftener than by chance."""
  if dataset.timestamps is None:
    return
  held, train = targets(dataset, 'test'), in_train(dataset)
  if not len(held.users_H) or not train.any():
    return
  times_H, sold_H = dataset.timestamps[held.places_H], train_counts(dataset)[held.items_H]
  first_I = np.full(len(dataset.item_ids), np.iinfo(np.int64).max)
  np.minimum.at(first_I, dataset.events[train], dataset.timestamps[train])
  future_H = (sold_H > 0) & (first_I[held.items_H] > times_H)
  chance = np.where(sold_H > 0, 1 / (sold_H + 1), 0).mean()
  if future_H.mean() - chance > MOST_MORE:
    earlier = (times_H < dataset.timestamps[train].max()).mean()
    yield finding(
        FUTURE, NOTE, f'{future_H.sum()} of {len(future_H)} test targets of {dataset.name} ({future_H.mean():.1%}) are items '
        f'that train parts hold, but only at later times; items sold evenly over time make {chance:.1%}. {earlier:.1%} of the '
        'targets are earlier than some train event: leave-one-out sees the future of other users, a split by time does not.',
        future_H.sum(),
        (f'{user_label(dataset, user)}: {item_label(dataset, item)}, {(first_I[item] - time) / 86400:.1f} days before any '
         'train part' for user, item, time in zip(
             held.users_H[future_H].tolist(), held.items_H[future_H].tolist(), times_H[future_H].tolist(), strict=True)))
