"""Matching and the student's own training losses."""
