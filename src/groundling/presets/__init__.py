"""Packaged configurations, one YAML file each; a file states only what differs from the defaults."""
