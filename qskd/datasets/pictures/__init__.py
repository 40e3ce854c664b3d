"""Picture files: found, decoded by one rule, turned upright with their boxes, and counted."""
