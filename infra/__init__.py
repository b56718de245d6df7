"""The world around the rooms: object stores, child processes, bundles and channels."""
