"""What looks wrong in a dataset, though every entry of it can be read: found while it is prepared, kept in its manifest."""
