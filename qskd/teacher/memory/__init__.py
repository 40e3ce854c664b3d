"""Along which directions a teacher's memory varies: what whitening weighs by, and what a small cache keeps."""
