// The CPU's kernels for one instruction set, with the options that `setup.py` gives to the compiler.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define GENGRAM_CAPABILITY avx2
#include "../cpu/kernels.cpp"
#endif
