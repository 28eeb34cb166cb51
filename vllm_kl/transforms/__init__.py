"""What TorchRL calls: transforms, modules of log-probs, and the seams of its collectors and weight updates."""
