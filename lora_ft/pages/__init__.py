"""What people read of a run: card, page, curves."""
