"""`qskd train` and `qskd distill`: driver, Ray Train's workers, the stream of batches."""
