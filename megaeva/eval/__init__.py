"""What a trained CLIP can do without further training: zero-shot classification and image-text retrieval."""
