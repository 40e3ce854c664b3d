"""One training of a sweep."""
