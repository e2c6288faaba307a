"""Expert parallelism: the forms in which tokens and experts of different ranks meet (DESIGN section 7)."""
