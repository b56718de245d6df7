"""Files in, files out: from metadata to training rows."""
