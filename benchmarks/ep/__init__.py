"""Expert parallelism: predicted over hundreds of ranks, measured over a few processes."""
