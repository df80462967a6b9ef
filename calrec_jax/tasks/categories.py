"""The 13 categories of the method, and what Amazon Review Data 2018 calls them (method: Data)."""

# Task name -> name in the dumps' files, `<name>_5.json.gz` and `meta_<name>.json.gz`.
TARGETS = {
    'industrial_and_scientific': 'Industrial_and_Scientific',
    'musical_instruments': 'Musical_Instruments',
    'arts_crafts_and_sewing': 'Arts_Crafts_and_Sewing',
    'office_products': 'Office_Products',
    'video_games': 'Video_Games',
    'pet_supplies': 'Pet_Supplies',
}
# In stage I only. Which seven they are is likely, not certain (docs/fidelity.md).
SOURCES = {
    'automotive': 'Automotive',
    'cell_phones_and_accessories': 'Cell_Phones_and_Accessories',
    'clothing_shoes_and_jewelry': 'Clothing_Shoes_and_Jewelry',
    'electronics': 'Electronics',
    'grocery_and_gourmet_food': 'Grocery_and_Gourmet_Food',
    'home_and_kitchen': 'Home_and_Kitchen',
    'movies_and_tv': 'Movies_and_TV',
}
CATEGORIES = TARGETS | SOURCES


def prepare_command(name: str, folder: object) -> str:
  """The command that makes the histories folder of data set `name`."""
  dump = CATEGORIES.get(name)
  if dump is None:
    return f'calrec prepare histories --sequences FILE --items FILE --name {name} --out {folder}'
  return (f'calrec prepare dumps --reviews {dump}_5.json.gz --meta meta_{dump}.json.gz --name {name} '
          f'--out {folder}')
