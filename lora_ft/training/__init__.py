"""What a Trainer is made of, and what surrounds it: rows, exact steps, guards, watchers."""
