"""Sequence models: attention and state-space layers, decoding, in-context learning."""
