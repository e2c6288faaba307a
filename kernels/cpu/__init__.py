"""CPU kernels in C++: compiled at first use, called through ctypes."""
