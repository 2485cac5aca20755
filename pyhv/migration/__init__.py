"""Live migration: a conversation between the process that runs a VM and the one that is to run it from now on.

protocol.py has its messages in one table, transport.py the ways in which two processes can talk, source.py and
destination.py the two sides. docs/migration.md tells how it goes.
"""
