"""What a training says of itself: rates, progress lines, pictures, the model card."""
