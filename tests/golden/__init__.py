"""Golden vectors: made once, read by every later version."""
