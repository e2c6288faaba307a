"""Planning and lowering: which way to run the experts, why, and the differentiable program for it.

Import name ``moepass.lowering`` (the folder is mapped by setuptools).
"""
