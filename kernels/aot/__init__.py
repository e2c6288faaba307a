"""Ahead-of-time compilation: every kernel that the schedule selects, for four GPUs that are not here.

``python -m moepass.kernels.aot`` holds registers, spills, shared memory and matrix instructions to ``budgets.json``.
"""
