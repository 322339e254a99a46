"""Adversarial perturbations within an L-infinity ball."""
