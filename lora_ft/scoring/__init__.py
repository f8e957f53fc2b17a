"""What an answer is worth: losses, metrics and rewards."""
