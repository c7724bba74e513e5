"""Who leaves a tier next: one interface (`base.py`), leaf-first LRU, S3-FIFO, ARC, and the learning default."""
