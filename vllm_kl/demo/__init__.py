"""The demo: a small model trained here, then the whole job on it. ``task`` -> ``train`` -> ``run`` -> ``report``."""
