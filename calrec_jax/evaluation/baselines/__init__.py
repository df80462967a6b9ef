"""Rankers that need no model, for comparison."""
