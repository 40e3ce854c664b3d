"""Files on any file system, temporary folders, patience with stores."""
