"""Starting or joining Ray: its environment, devices and room."""
