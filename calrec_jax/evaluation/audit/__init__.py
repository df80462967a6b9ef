"""Leaks: what a data set, or a run, lets a model know that it should not."""
