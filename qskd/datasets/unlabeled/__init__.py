"""Images that nobody has labelled: what is in them is not known, which is not the same as that nothing is."""
