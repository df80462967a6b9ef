"""The decoder, its two towers, and their losses."""
