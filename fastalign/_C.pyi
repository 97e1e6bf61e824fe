# Loading this module registers the C++ kernels; it has no names of its own.
