"""GPT-2: the network, its cache for decoding, its weights on disk."""
