"""Random transforms as batched tensor programs."""
