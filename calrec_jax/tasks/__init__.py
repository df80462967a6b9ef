"""SeqIO Tasks and Mixtures."""
