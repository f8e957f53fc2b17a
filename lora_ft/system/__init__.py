"""What the machine gives a process, and how files are put on its disk."""
