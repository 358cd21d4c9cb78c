"""The bundled program: adapts a CLIP to a few images a class, and measures what it learned and what it forgot."""
