"""The demo world as a source: its metadata in LAION's columns, and the server of its pictures."""
