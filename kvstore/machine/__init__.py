"""The real ports of kvstore/seams.py: this machine's clock, memory, disk and processes."""
