"""Teachers that are no DETR: boxes, scores and classes alone, from a file."""
