"""One process that many use: the engine that decodes their requests together, the API and the page before it."""
