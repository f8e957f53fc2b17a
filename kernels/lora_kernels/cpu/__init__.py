"""What a CPU does between matrix products, compiled for it where it runs; without a compiler torch does it."""
