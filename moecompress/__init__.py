"""moecompress: compress Mixture-of-Experts language models to a byte budget, and prove what it cost."""

__version__ = "0.1.0"
