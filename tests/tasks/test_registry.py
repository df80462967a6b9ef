"""A Task's examples are the histories' spans, in text and in the token table's tokens; rates follow n^0.3."""

import numpy as np
import pytest
import seqio

from calrec_jax.data import histories as histories_lib
from calrec_jax.data.histories import Histories
from calrec_jax.errors import UserError
from calrec_jax.tasks import registry
from calrec_jax.tasks.categories import CATEGORIES
from calrec_jax.text.item_tokens import load_item_tokens, prompt_tokens
from calrec_jax.text.templates import FIRST, ItemTemplate, text_pair
from calrec_jax.text.vocabularies import template_phrases, train_vocabulary

TEMPLATE = ItemTemplate()
USERS = {'video_games': 40, 'own_shop': 5}
FEATURES = {'inputs', 'targets', 'inputs_pretokenized', 'targets_pretokenized', 'user_id'}


def _histories(name: str, users: int) -> Histories:
  rng = np.random.default_rng(users)
  items = [{'title': f'{name} no. {n} Größe', 'category': 'Things', 'brand': '', 'price': f'${n}.5'} for n in range(9)]
  lengths = rng.integers(2, 8, users)
  return Histories(name, [f'{name}-u{n}' for n in range(users)], [f'i{n}' for n in range(9)], items,
                   np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, 9, lengths.sum()).astype(np.int32))


DATA = {name: _histories(name, users) for name, users in USERS.items()}
VOCABULARY = train_vocabulary(
    [' ' + TEMPLATE.item_text(item) for data in DATA.values() for item in data.items], size=330,
    phrases=template_phrases(TEMPLATE))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  for name, data in DATA.items():
    (folder / name).mkdir()
    histories_lib.write(folder / name, data, {})
  (folder / 'raw').mkdir()  # no histories folder
  return folder


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch):
  monkeypatch.setattr(seqio.TaskRegistry, '_REGISTRY', {})
  monkeypatch.setattr(seqio.MixtureRegistry, '_REGISTRY', {})


def _examples(name: str, split: str, lengths=None, **options) -> list[dict]:
  dataset = seqio.get_mixture_or_task(name).get_dataset(lengths, split, shuffle=False, **options)
  return list(dataset.as_numpy_iterator())


def _expected(data: Histories, folder, split: str, targets: str) -> list[dict]:
  """The examples computed from the histories and the token table, without TensorFlow."""
  table = load_item_tokens(folder, data, TEMPLATE, VOCABULARY)
  prompts = prompt_tokens(VOCABULARY)
  rows = []
  for user in range(len(data.user_ids)):
    events = data.seen(user, split)
    ends = range(2, len(events) + 1) if targets == 'all' and split == 'train' else [len(events)]
    for end in ends if len(events) > 1 else []:
      inputs, text = text_pair([TEMPLATE.item_text(data.items[i]) for i in events[:end]])
      pieces = [part for i in events[:end - 1] for part in (table.item(i), prompts.next)]
      rows.append({'user_id': data.user_ids[user].encode(), 'inputs': np.concatenate([prompts.first, *pieces]),
                   'targets': np.append(table.item(events[end - 1]), VOCABULARY.eos_id),
                   'inputs_pretokenized': inputs.encode(), 'targets_pretokenized': text.encode()})
  return rows


def _same(a: list[dict], b: list[dict]) -> bool:
  return len(a) == len(b) and all(
      x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('targets', ['last', 'all'])
@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
@pytest.mark.parametrize('name', USERS)
def test_examples_are_those_of_the_histories_and_the_token_table(data_dir, tmp_path, name, split, targets):
  registry.register(data_dir, VOCABULARY, targets=targets)
  found, expected = _examples(name, split), _expected(DATA[name], tmp_path, split, targets)
  assert expected and _same(found, expected)
  assert set(found[0]) == FEATURES and found[0]['inputs'].dtype == found[0]['targets'].dtype == np.int32
  assert seqio.get_mixture_or_task(name).num_input_examples(split) == len(expected)
  other = {'train': 'validation', 'validation': 'test', 'test': 'train'}[split]
  assert not _same(found, _expected(DATA[name], tmp_path, other, targets))  # the mutant: another split


def test_last_and_all_differ_in_the_train_split_only(data_dir, tmp_path):
  for split, same in {'train': False, 'validation': True, 'test': True}.items():
    assert _same(*(_expected(DATA['video_games'], tmp_path, split, targets) for targets in ('last', 'all'))) == same


def test_tokens_decode_to_the_texts(data_dir):
  registry.register(data_dir, VOCABULARY)
  for example in _examples('own_shop', 'test'):
    assert VOCABULARY.decode(example['inputs'].tolist()) == example['inputs_pretokenized'].decode()
    assert VOCABULARY.decode(example['targets'].tolist()) == example['targets_pretokenized'].decode()


def test_long_histories_keep_their_newest_whole_items_and_the_prompt(data_dir):
  registry.register(data_dir, VOCABULARY)
  whole = _examples('own_shop', 'test')
  room = 40
  assert max(len(example['inputs']) for example in whole) > room
  for example, full in zip(_examples('own_shop', 'test', {'inputs': room, 'targets': 64}), whole, strict=True):
    inputs = example['inputs_pretokenized'].decode()
    assert len(example['inputs']) <= room
    assert VOCABULARY.decode(example['inputs'].tolist()) == inputs
    items = inputs.split(' item bought is as follows.')
    assert full['inputs_pretokenized'].decode().split(' item bought is as follows.')[-len(items) + 1:] == items[1:]
    np.testing.assert_array_equal(example['targets'], full['targets'])


def test_an_item_that_does_not_fit_is_cut_at_its_end(data_dir):
  registry.register(data_dir, VOCABULARY)
  prompts = prompt_tokens(VOCABULARY)
  for example, full in zip(_examples('own_shop', 'test', {'inputs': 6, 'targets': 4}), _examples('own_shop', 'test'),
                           strict=True):
    assert len(example['inputs']) == 6 and example['inputs'][-1] == prompts.next[-1]
    np.testing.assert_array_equal(example['targets'], [*full['targets'][:3], VOCABULARY.eos_id])


def test_shards_part_the_users(data_dir):
  registry.register(data_dir, VOCABULARY)
  whole = {example['user_id'] for example in _examples('video_games', 'test')}
  shards = [{example['user_id'] for example in _examples('video_games', 'test', shard_info=seqio.ShardInfo(i, 3))}
            for i in range(3)]
  assert set.union(*shards) == whole and sum(map(len, shards)) == len(whole)


def test_shuffling_is_a_function_of_the_seed(data_dir):
  registry.register(data_dir, VOCABULARY)
  task = seqio.get_mixture_or_task('video_games')
  order = [[example['user_id'] for example in task.get_dataset(None, 'test', seed=seed).as_numpy_iterator()]
           for seed in (1, 1, 2)]
  assert order[0] == order[1] != order[2] and sorted(order[0]) == sorted(order[2])


def test_the_rates_are_the_users_to_the_power_of_0_3(data_dir):
  registry.register(data_dir, VOCABULARY)
  mixture = seqio.MixtureRegistry.get('stage1_mixture')
  assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == pytest.approx(
      {name: users ** 0.3 for name, users in USERS.items()})
  total = 40 ** 0.3 + 5 ** 0.3
  assert registry.resolve('stage1_mixture') == [('own_shop', pytest.approx(5 ** 0.3 / total)),
                                                ('video_games', pytest.approx(40 ** 0.3 / total))]


def test_a_mixture_gives_both_data_sets_at_their_rates(data_dir):
  registry.register(data_dir, VOCABULARY, exponent=0.)
  dataset = seqio.get_mixture_or_task('stage1_mixture').get_dataset(
      {'inputs': 128, 'targets': 32}, 'validation', shuffle=False, passthrough_features=['user_id'])
  users = [example['user_id'].decode() for example in dataset.take(400).as_numpy_iterator()]
  assert 0.4 < sum(user.startswith('own_shop') for user in users) / 400 < 0.6


def test_t5x_reads_the_examples_through_a_feature_converter(data_dir):
  registry.register(data_dir, VOCABULARY, targets='all')
  converter = seqio.PrefixLMFeatureConverter(pack=False)
  batches = seqio.get_dataset('stage1_mixture', {'inputs': 96, 'targets': 32}, converter, shuffle=True, seed=0)
  first = next(batches.as_numpy_iterator())
  assert first['decoder_target_tokens'].shape == (128,)
  text = VOCABULARY.decode(first['decoder_target_tokens'].tolist())  # up to EOS: the whole history
  assert text.startswith(FIRST) and text.endswith('.')


def test_a_task_resolves_to_itself(data_dir):
  registry.register(data_dir, VOCABULARY)
  assert registry.resolve('own_shop') == [('own_shop', 1.0)]


def test_a_mixture_of_mixtures_resolves_to_the_data_sets(data_dir):
  registry.register(data_dir, VOCABULARY)
  seqio.MixtureRegistry.add('nested', [('stage1_mixture', 3), ('own_shop', 1)])
  share = 5 ** 0.3 / (5 ** 0.3 + 40 ** 0.3)
  assert dict(registry.resolve('nested')) == pytest.approx(
      {'own_shop': (3 * share + 1) / 4, 'video_games': 3 * (1 - share) / 4})


def test_all_categories_and_all_folders_have_a_task(data_dir):
  assert registry.register(data_dir, VOCABULARY) == sorted({*CATEGORIES, 'own_shop'})
  assert set(seqio.TaskRegistry.names()) == {*CATEGORIES, 'own_shop'}


def test_registering_again_replaces(data_dir):
  registry.register(data_dir, VOCABULARY, targets='all')
  n_all = len(_examples('video_games', 'train'))
  registry.register(data_dir, VOCABULARY, names=['video_games'], targets='last')
  assert len(_examples('video_games', 'train')) < n_all
  assert registry.resolve('stage1_mixture') == [('video_games', 1.0)]


def test_a_folder_without_description_is_counted_by_its_lines(data_dir, tmp_path):
  folder = tmp_path / 'own_shop'
  folder.mkdir()
  for name in ('sequences.jsonl.gz', 'items.jsonl.gz'):
    (folder / name).write_bytes((data_dir / 'own_shop' / name).read_bytes())
  registry.register(tmp_path, VOCABULARY)
  assert registry.resolve('stage1_mixture') == [('own_shop', 1.0)]
  assert seqio.TaskRegistry.get('own_shop').source.n_users == 5


def test_a_missing_folder_is_named_with_its_command_when_it_is_used(data_dir):
  registry.register(data_dir, VOCABULARY)
  for use in (lambda: registry.resolve('pet_supplies'), lambda: _examples('pet_supplies', 'train')):
    with pytest.raises(UserError, match=r'pet_supplies: .* calrec prepare dumps --reviews Pet_Supplies_5.json.gz'):
      use()


def test_a_mixture_with_a_missing_folder_is_refused_when_it_is_used(data_dir, tmp_path):
  registry.register(data_dir, VOCABULARY, mixture_names=['video_games', 'electronics'])
  with pytest.raises(UserError, match='meta_Electronics.json.gz'):
    registry.resolve('stage1_mixture')
  registry.register(tmp_path, VOCABULARY)  # no data at all: the mixture of the 13 categories
  with pytest.raises(UserError, match='Arts_Crafts_and_Sewing_5.json.gz'):
    registry.resolve('stage1_mixture')


def test_an_unknown_name_lists_the_known_ones(data_dir):
  registry.register(data_dir, VOCABULARY)
  with pytest.raises(UserError, match=r"'video_gmaes': no such .* own_shop, .*stage1_mixture, video_games"):
    registry.resolve('video_gmaes')


def test_a_task_of_another_source_is_refused(data_dir):
  source = seqio.FunctionDataSource(lambda split, shuffle_files: None, ['train'])
  task = seqio.TaskRegistry.add('strange', source=source, output_features={'targets': seqio.Feature(VOCABULARY)})
  with pytest.raises(UserError, match="'strange' is not made of a histories folder"):
    registry.resolve(task.name)


@pytest.mark.parametrize('options, message', [
    ({'targets': 'first'}, "targets = 'first'"), ({'mixture': 'video_games'}, 'names both'),
    ({'names': ['my-shop']}, "'my-shop' cannot name"), ({'mixture_names': ['own_shopp']}, 'own_shopp.* not data sets')])
def test_wrong_values_are_refused(data_dir, options, message):
  with pytest.raises(UserError, match=message):
    registry.register(data_dir, VOCABULARY, **options)


def test_a_mixture_of_unknown_names_lists_the_data_sets_that_are_there(data_dir, tmp_path):
  with pytest.raises(UserError) as found:
    registry.register(data_dir, VOCABULARY, mixture_names=['shop', 'video_games', 'book'])
  assert str(found.value) == ("The mixture 'stage1_mixture' (inputs.mixture) names 'book', 'shop', which are not data sets; "
                              'DATA_DIR has own_shop, video_games.')
  with pytest.raises(UserError, match='DATA_DIR has none'):
    registry.register(tmp_path, VOCABULARY, mixture_names=['shop'])


def test_a_missing_data_dir_is_named(tmp_path):
  with pytest.raises(UserError, match='nowhere: no such folder'):
    registry.register(tmp_path / 'nowhere', VOCABULARY)
