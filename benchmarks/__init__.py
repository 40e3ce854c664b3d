"""Every figure the documents quote, as a program anyone can run: `python -m benchmarks.NAME`. (`host_waits`, `local_cache`,
`step_cases` and `timing` are what they share.)"""
