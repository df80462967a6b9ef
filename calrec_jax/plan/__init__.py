"""Know before you launch: programs compiled for TPU topologies on a machine without a TPU, and what they will cost."""
