"""Other weights for an engine: checkpoints, loads, pushes, refreshes, adapters, and the versions that scores carry."""
