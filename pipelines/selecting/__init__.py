"""The images worth labelling, caching or training on (`qskd select`)."""
