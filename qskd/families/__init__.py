"""transformers' DETR families: a file each, and a row of facts each (`facts`, light)."""
