// The CPU's kernels for one instruction set, with the options that `setup.py` gives to the compiler.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define GENGRAM_CAPABILITY avx512
#include "../cpu/kernels.cpp"
#endif
