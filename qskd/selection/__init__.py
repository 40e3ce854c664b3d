"""Which images are worth teaching on: by chance, by what the teacher says of them, by what they teach."""
