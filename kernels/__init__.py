"""Kernels behind ``torch.library`` ops: one family per file, one implementation per device.

Import name ``moepass.kernels`` (the folder is mapped by setuptools; ``kernels`` alone is another project's package).
"""
