"""Tests of the Python half of the wire."""
