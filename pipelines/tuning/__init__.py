"""`qskd tune`: a sweep, its driver and its records."""
