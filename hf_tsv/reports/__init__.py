"""Cards, pictures and pages: what people look at."""
