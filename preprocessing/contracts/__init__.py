"""What is published between stages: types, Arrow schemas, digests."""
