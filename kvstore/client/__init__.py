"""The client of the service: lookups, gets, puts, pins, hints. `kv_client.py` is the door."""
