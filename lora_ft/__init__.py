"""Fine-tune a language model with small adapters, and prove that it worked."""

__version__ = "0.1.0"
