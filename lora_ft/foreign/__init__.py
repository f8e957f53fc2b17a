"""What others made, read so that it can neither run code nor fill the machine, nor pass for what it is not."""
