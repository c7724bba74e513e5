"""Who holds which prefix: the coordinator's logic and a client's local view, without a network."""
