"""Commands that use trained models and train none: generate, bestofn, evaluate."""
