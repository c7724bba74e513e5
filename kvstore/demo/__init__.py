"""What `kvstore demo` runs: two replicas of a real language model that share KV through a cluster of this machine."""
