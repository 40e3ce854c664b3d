"""Reading checkpoints that others made: files, configuration, weights, preprocessing; nothing in them runs or calls out."""
