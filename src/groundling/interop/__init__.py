"""In and out: the formats of other programs, both directions of each in one place, and the hub."""
