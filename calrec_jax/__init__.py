"""CALRec in JAX: a language model, finetuned in two stages with contrastive alignment, ranks a catalogue."""

__version__ = '0.1.0'
