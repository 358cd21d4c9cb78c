"""The pictures world: emoji drawn by seven icon families, and the small CLIP that learns their names from six."""
