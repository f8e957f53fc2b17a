"""The transformers model inside: how it is run, what its layers do, what an adapter changes in it."""
