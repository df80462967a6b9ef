"""From texts to a ranking of the catalogue."""
