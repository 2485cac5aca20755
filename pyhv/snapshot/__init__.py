"""A snapshot: a VM's state records and memory in one file (docs/snapshot-format.md)."""
