"""Learning from images before a merge: α and coefficients."""
