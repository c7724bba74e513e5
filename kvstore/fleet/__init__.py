"""A whole service put together: on Ray, or as plain processes of this machine."""
