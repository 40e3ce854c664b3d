"""The job that runs the teacher once and keeps its outputs."""
