"""Plans of models that are not compiled: ``moepass.explain``, and what a model would cost elsewhere."""
