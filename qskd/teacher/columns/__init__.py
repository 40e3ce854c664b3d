"""What the cache keeps of a view: one file, an entry of `table.COLUMNS`, for each thing. Importing it imports no torch."""
