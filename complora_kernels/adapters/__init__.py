"""The life of an adapter: built, installed, used, saved and loaded, and exchanged with other programs."""
