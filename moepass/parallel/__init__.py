"""Expert-parallel meshes, DTensor placement and distributed checkpoints (DESIGN section 7)."""
