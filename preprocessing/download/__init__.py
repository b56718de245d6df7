"""The download stage: addresses, fetching, pictures."""
