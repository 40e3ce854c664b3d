"""From shards to the batches of a training worker, through Ray Data."""
