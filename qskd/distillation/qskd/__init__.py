"""QSKD (arXiv 2409.06443): query selection and the two losses that it guides."""
