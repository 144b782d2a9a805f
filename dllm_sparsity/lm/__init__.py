"""What both backends share: loading a model, calling it, and the lm-eval side of a language model."""
