"""Looking at detectors: evaluate, predict, explain."""
