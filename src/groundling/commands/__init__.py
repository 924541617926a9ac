"""The commands, one module each: parse, call the rooms below, print. `cli.py` imports them when called."""
