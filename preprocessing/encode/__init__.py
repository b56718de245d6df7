"""From pictures to training rows."""
