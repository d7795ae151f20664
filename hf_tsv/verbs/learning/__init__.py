"""What is learned from images before a merge: α and coefficients."""
