"""From a trained network and a prompt to text."""
