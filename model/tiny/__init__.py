"""Tiny models that really work, and the demo world that they were trained on."""
