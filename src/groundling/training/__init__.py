"""Training: the loop, when it stops, what it saves, what it shows."""
