"""What is drawn: an image explained, boxes, curves."""
