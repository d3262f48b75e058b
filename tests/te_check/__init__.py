"""What `make te-check` runs: the Transformer Engine backend against the real package, on a machine without a GPU."""
