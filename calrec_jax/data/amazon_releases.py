"""Where the publishers keep the three Amazon releases: addresses, categories, and what they say of the use.

None of these addresses could be tried from where this was written, on 2026-11-28. They, the categories and the papers are as
the publishers' pages, and others' programs that fetch from there, had them; a host that has moved is what `--mirror` is for.
"""

import dataclasses
import urllib.parse
from collections.abc import Sequence

from calrec_jax.errors import UserError

_IN_ALL_THREE = (  # releases
    'Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics '
    'Grocery_and_Gourmet_Food Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments Office_Products '
    'Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games').split()
_SINCE_2018 = ('All_Beauty Appliances Arts_Crafts_and_Sewing Gift_Cards Industrial_and_Scientific Magazine_Subscriptions '
               'Software').split()


@dataclasses.dataclass(frozen=True)
class Release:
  """One release.

  Attributes:
    title: as its publishers call it.
    bases: addresses under which its files lie, or lay; the first is asked.
    reviews, five_core, ratings, meta: the path of a file from there; `{}` is the category. `five_core` holds the reviews of
      the publishers' own 5-core, `ratings` all reviews without their texts: users, items, stars and times.
    categories: all that have reviews and metadata.
    without_five_core: those of them that have no 5-core file.
    page: where the publishers describe it, and say what they ask of users.
    papers: what they ask to cite.
    terms: what else is known of the terms.
  """

  title: str
  bases: tuple[str, ...]
  reviews: str
  five_core: str
  ratings: str
  meta: str
  categories: tuple[str, ...]
  without_five_core: tuple[str, ...]
  page: str
  papers: str
  terms: str

  @property
  def note(self) -> str:
    """What one should know before using it: three lines."""
    return (f'Terms: {self.terms}\nThe publishers ask to cite {self.papers}.\n'
            f'Read {self.page} before you use the data; whether your use is allowed is for you to find out.')


_NO_LICENCE = 'the data is published for research; no licence by its publishers is known here.'
_MCAULEY = 'https://mcauleylab.ucsd.edu/public_datasets/data'
_DATAREPO = 'https://datarepo.eng.ucsd.edu/mcauley_group/data'  # forwards to the former, or did

RELEASES = {
    2014: Release(
        title='Amazon product data (2014)',
        bases=('https://snap.stanford.edu/data/amazon/productGraph/categoryFiles',
               'http://snap.stanford.edu/data/amazon/productGraph/categoryFiles'),
        reviews='reviews_{}.json.gz', five_core='reviews_{}_5.json.gz', ratings='ratings_{}.csv', meta='meta_{}.json.gz',
        categories=tuple(sorted([*_IN_ALL_THREE, 'Amazon_Instant_Video', 'Apps_for_Android', 'Baby', 'Beauty',
                                 'Health_and_Personal_Care'])),
        without_five_core=(), page='https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html',
        papers='R. He and J. McAuley, "Ups and downs: modeling the visual evolution of fashion trends with one-class '
               'collaborative filtering" (WWW 2016), or J. McAuley, C. Targett, J. Shi and A. van den Hengel, "Image-based '
               'recommendations on styles and substitutes" (SIGIR 2015), or both',
        terms=_NO_LICENCE),
    2018: Release(
        title='Amazon Review Data (2018)',
        bases=(f'{_MCAULEY}/amazon_v2', 'https://jmcauley.ucsd.edu/data/amazon_v2', f'{_DATAREPO}/amazon_v2',
               'http://deepyeti.ucsd.edu/jianmo/amazon'),
        reviews='categoryFiles/{}.json.gz', five_core='categoryFilesSmall/{}_5.json.gz', ratings='categoryFilesSmall/{}.csv',
        meta='metaFiles2/meta_{}.json.gz',
        categories=tuple(sorted([*_IN_ALL_THREE, *_SINCE_2018, 'AMAZON_FASHION', 'Luxury_Beauty', 'Prime_Pantry'])),
        without_five_core=(), page='https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/',
        papers='J. Ni, J. Li and J. McAuley, "Justifying recommendations using distantly-labeled reviews and fine-grained '
               'aspects" (EMNLP 2019)',
        terms=_NO_LICENCE),
    2023: Release(
        title="Amazon Reviews'23",
        bases=(f'{_MCAULEY}/amazon_2023', f'{_DATAREPO}/amazon_2023'),
        reviews='raw/review_categories/{}.jsonl.gz', five_core='benchmark/5core/rating_only/{}.csv.gz',
        ratings='benchmark/0core/rating_only/{}.csv.gz', meta='raw/meta_categories/meta_{}.jsonl.gz',
        categories=tuple(sorted([
            *_IN_ALL_THREE, *_SINCE_2018, 'Amazon_Fashion', 'Baby_Products', 'Beauty_and_Personal_Care', 'Handmade_Products',
            'Health_and_Household', 'Health_and_Personal_Care', 'Subscription_Boxes', 'Unknown'])),
        without_five_core=('Amazon_Fashion', 'Appliances', 'Digital_Music', 'Handmade_Products', 'Health_and_Personal_Care',
                           'Subscription_Boxes'),
        page='https://amazon-reviews-2023.github.io/',
        papers='Y. Hou, J. Li, Z. He, A. Yan, X. Chen and J. McAuley, "Bridging language and items for retrieval and '
               'recommendation" (arXiv:2403.03952)',
        terms='its publishers write that they "are not in a position to assign a license to this dataset or dictate the terms '
              'of its usage", and that it is available "primarily for research purposes" '
              '(https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/discussions/1).'),
}


def release(year: int) -> Release:
  """The release of a year. Raises UserError if there is none."""
  if year not in RELEASES:
    raise UserError(f'--year {year}: there is no such release; choose one of {", ".join(map(str, RELEASES))}.')
  return RELEASES[year]


def addresses(year: int, categories: Sequence[str], *, five_core: bool = False, ratings: bool = False,
              mirror: str | None = None) -> list[str]:
  """The addresses of the reviews and metadata of some categories, in this order for each of them.

  Args:
    year: 2014, 2018 or 2023.
    categories: as the publishers write them; one that is given twice counts once.
    five_core: whether the reviews are those of the publishers' 5-core (in 2023: ratings without texts).
    ratings: whether ratings take the place of the reviews, which are several times larger for their texts.
    mirror: an address to use for the publishers' own; the files' paths from there are the same.

  Raises:
    UserError: there is no such year or category, both kinds of reviews are asked for, or the mirror is no http address.
  """
  found = release(year)
  if five_core and ratings:
    raise UserError('--five_core and --ratings: choose one of them, or one after the other with another --out.')
  reviews = found.five_core if five_core else found.ratings if ratings else found.reviews
  base = found.bases[0] if mirror is None else _checked(mirror)
  known = [name for name in found.categories if not (five_core and name in found.without_five_core)]
  for category in categories:
    if category not in known:
      what = 'of a 5-core' if category in found.categories else 'of that name'
      raise UserError(f'--category {category}: {found.title} has no file {what}; it has {", ".join(known)}.')
  return [f'{base}/{path.format(category)}' for category in dict.fromkeys(categories)
          for path in (reviews, found.meta)]


def _checked(mirror: str) -> str:
  """An address without a slash at its end."""
  try:
    parts = urllib.parse.urlsplit(mirror)
    good = parts.scheme in ('http', 'https') and parts.hostname and not (parts.query or parts.fragment) and parts.port != 0
  except ValueError:
    good = False
  if not good or not mirror.isascii() or not mirror.isprintable() or ' ' in mirror:
    raise UserError(f'--mirror {mirror}: is no address of a folder; give one such as {RELEASES[2018].bases[1]}.')
  return mirror.rstrip('/')
