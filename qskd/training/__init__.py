"""One training step and its state, free of Ray."""
