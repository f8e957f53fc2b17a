"""The options of the command line and the commands that are more than one call."""
