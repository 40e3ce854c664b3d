"""What kills, full disks and lost stores do to the three jobs (see `__main__`)."""
