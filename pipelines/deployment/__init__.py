"""`qskd export` and `qskd benchmark`."""
