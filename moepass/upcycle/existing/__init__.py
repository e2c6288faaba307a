"""Mixture-of-experts blocks that a model already has: read, proved by numbers, and run by moepass."""
