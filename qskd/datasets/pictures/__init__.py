"""Picture files: found, decoded by one rule, turned upright with their boxes, counted, and shipped to where the model runs."""
