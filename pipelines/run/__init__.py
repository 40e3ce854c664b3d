"""A run's folder: what is in it, who may write to it, how a recipe is resolved."""
