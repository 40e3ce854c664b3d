"""A teacher's detections as a dataset's labels (`qskd label`)."""
