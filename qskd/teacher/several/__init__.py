"""Several teachers in one recipe (`teacher.also`): whose a class is, and their answers as one."""
