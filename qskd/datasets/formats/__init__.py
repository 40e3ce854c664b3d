"""Datasets in other formats, read as COCO JSON is: same samples and checks (docs/data.md). `opening.open_dataset` is the way in."""
