"""Benchmarks: ratios of two things measured in turns within one run (`kvstore bench NAME --json`)."""
