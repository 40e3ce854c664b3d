"""The teacher, at work or as its cache remembers it, and the cache itself."""
