"""What the student alone sees of an image: colours, blur, erased parts, another size."""
