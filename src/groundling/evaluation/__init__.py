"""What a model knows, measured over the whole text."""
