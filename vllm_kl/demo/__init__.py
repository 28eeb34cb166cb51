"""The demo: trains a small model on word problems, collects its KL, checks the KL and shows it."""
