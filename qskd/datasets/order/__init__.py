"""Which images are drawn, how often, and in which order: a function of the seed, the epoch and what `qskd select` chose."""
