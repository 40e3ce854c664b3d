"""`qskd doctor`: this machine, each node, the services."""
