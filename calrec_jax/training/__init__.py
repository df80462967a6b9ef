"""From rows to a finetuned checkpoint."""
