"""The words of the generated store: the same rules of naming in each category, with nouns and brands of its own."""

import numpy as np

# Folder-safe name -> (levels above the kind, kinds of product). No name is one of Amazon's categories.
THEMES = {
    'Garden_Tools': (('Garden Tools', 'Cutting & Planting'),
                     ('Pruning Shears', 'Hand Trowels', 'Soil & Seed Trays', 'Hose Nozzles', 'Plant Labels',
                      'Leaf Rakes')),
    'Kitchen_Ware': (('Kitchen Ware', 'Cooking, Baking & Serving'),
                     ('Mixing Bowls', 'Baking Tins', 'Salt & Pepper Mills', "Cook's Knives", 'Tea Kettles',
                      'Oven Gloves')),
    'Craft_Supplies': (('Craft Supplies', 'Paint & Paper'),
                       ('Brush Sets', 'Watercolour Pads', "Artist's Easels", 'Ink & Pen Kits', 'Sewing Threads',
                        'Clay Blocks')),
    'Board_Games': (('Board Games', 'Family & Strategy'),
                    ('Quest Games', 'Card Decks', 'Dice & Token Packs', "Player's Guides", 'Puzzle Boxes',
                     'Map Tiles')),
    'Bike_Parts': (('Bike Parts', 'Wheels & Drive'),
                   ('Chain Rings', 'Brake Pads', 'Nuts & Bolts', 'Inner Tubes', "Rider's Gloves", 'Pedal Pairs')),
    'Home_Laboratory': (('Home Laboratory', 'Glass & Measuring'),
                        ('Test Tubes', 'Lens Kits', 'Flasks & Stoppers', 'Scale Weights', "Student's Manuals",
                         'Sample Jars')),
    'Music_Gear': (('Music Gear', 'Strings & Keys'),
                   ('Guitar Strings', 'Drum Sticks', 'Reeds & Mutes', "Beginner's Songbooks", 'Tuning Forks',
                    'Cable Reels')),
    'Desk_Supplies': (('Desk Supplies', 'Writing & Filing'),
                      ('Gel Pens', 'Note Blocks', 'Clips & Pins', "Writer's Journals", 'Ring Binders', 'Label Rolls')),
}
MARKS = ('Classic', 'Compact', 'Deluxe', 'Light', 'Robust', 'Silver', 'Sturdy', 'Travel')
SYLLABLES = ('ba', 'do', 'fe', 'ga', 'hi', 'ka', 'lo', 'ma', 'ne', 'po', 'ra', 'su', 'ta', 'vi', 'wo', 'za')
ENDINGS = ('l', 'n', 'r', 'x')


def invented_words(rng: np.random.Generator, n_syllables: int) -> list[str]:
  """All words of `n_syllables` syllables and an ending, capitalised, in random order: 'Takul', 'Vinen', …"""
  words = ['']
  for _ in range(n_syllables):
    words = [word + syllable for word in words for syllable in SYLLABLES if not word.endswith(syllable)]
  words = [(word + ending).capitalize() for word in words for ending in ENDINGS]
  return [words[index] for index in rng.permutation(len(words))]
