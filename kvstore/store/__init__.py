"""The tiered store of one worker: what moves bytes between memory, disk and Redis. `tiered.py` is the door."""
