"""Time and machines: the Prefect flows, and the command line."""
