"""The bundled program: adapts a CLIP to a few images per class, and measures what it has learned and retained."""
