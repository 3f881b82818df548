"""Recordings in files: writing them while a machine runs, reading them back, and what is shown of them."""
