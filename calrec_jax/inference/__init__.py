"""From a checkpoint to generated texts."""
