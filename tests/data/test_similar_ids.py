"""Similar ids are the same ones in Python, in SQL, and as one would say it."""

import duckdb
import hypothesis
from hypothesis import strategies as st

from calrec_jax.data import filtering, similar_ids

IDS = st.lists(st.text('aAbBéÉ \t\n\r\f-7\U0001f381م', min_size=1, max_size=4), unique=True, max_size=30)


def of_sql(users, items):
  connection = duckdb.connect()
  connection.execute('CREATE TABLE users (id VARCHAR, code BIGINT); CREATE TABLE items (id VARCHAR, code BIGINT)')
  for table, ids in (('users', users), ('items', items)):
    connection.executemany(f'INSERT INTO {table} VALUES (?, ?)', [['a', -1], *([id_, code] for code, id_ in enumerate(ids))])
  connection.execute(f'''CREATE TABLE histories AS SELECT range % {len(users)} AS user, range % {len(items)} AS item
                         FROM range({len(users) * len(items)})''')
  return filtering.similar_ids(connection)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(IDS.filter(bool), IDS.filter(bool))
def test_similar_ids(users, items):
  plain = lambda text: text.lower().translate(dict.fromkeys(map(ord, ' \t\n\r\f')))
  similar = lambda ids: [any(plain(one) == plain(other) for other in ids if other != one) for one in ids]
  assert similar_ids.marks(users) == similar(users)
  expected = {'users': sum(similar(users)), 'items': sum(similar(items))}
  assert similar_ids.counts(users, items) == of_sql(users, items) == expected
