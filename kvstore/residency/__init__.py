"""What lies where in one worker, and who leaves next. Pure: `residency.py` decides, `kvstore.store.tiered` executes."""
