"""Holds the classes that TorchRL calls: transforms, modules that return log-probs, weight update hooks."""
