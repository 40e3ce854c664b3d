"""The quickstart."""
