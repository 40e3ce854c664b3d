"""Every figure the documents quote, as a program anyone can run: `python -m benchmarks.NAME`."""
