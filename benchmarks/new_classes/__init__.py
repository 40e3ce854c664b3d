"""New classes without forgetting: an old detector, labels of new classes alone, and what is left of the old ones."""
