"""Manifests for Kubernetes, and what computes parts of them."""
