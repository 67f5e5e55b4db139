"""What happens around the updates: epochs, evaluation, checkpoints, trackers and the time left."""
