"""What a run says of itself, and the questions it is held to."""
