"""How an exported graph is held to the student that it was made of, where not all of their outputs can be alike."""
