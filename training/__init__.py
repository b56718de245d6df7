"""Steps: from training rows to checkpoints, reports and exports."""
