// Threads of a grid, for nvcc and, as an emulation, for any C++ compiler: the kernels in bodies.h are written once.
//
// A kernel is a struct with its arguments, `kThreads` (the most threads of a block), `kBlocks` (that a multiprocessor is
// to hold: this bounds the registers), `kPhases`, and `phase<P>(thread)`; between two phases the threads of a block wait
// for each other.
#pragma once

#include "../half.h"
#include "../motif_memory.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GENGRAM_UNROLL _Pragma("unroll")
#define GENGRAM_KEEP_LOOP _Pragma("unroll 1")
#define GENGRAM_THREAD __device__ __forceinline__
#else
#include <cmath>
#include <vector>
#define GENGRAM_UNROLL
#define GENGRAM_KEEP_LOOP
#define GENGRAM_THREAD inline
#endif

namespace gengram {
inline namespace GENGRAM_CAPABILITY {

constexpr int kWarp = 32;
constexpr int kColumns = 4;  // of a thread

// Neighbouring columns, the part of a row that belongs to one thread.
struct alignas(16) Four {
  float x[kColumns];
};

GENGRAM_THREAD Four filled(float value) {
  Four out;
  GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) out.x[i] = value;
  return out;
}

GENGRAM_THREAD Four operator+(const Four& a, const Four& b) {
  Four out;
  GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) out.x[i] = a.x[i] + b.x[i];
  return out;
}

GENGRAM_THREAD Four operator*(const Four& a, float b) {
  Four out;
  GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) out.x[i] = a.x[i] * b;
  return out;
}

GENGRAM_THREAD Four operator*(const Four& a, const Four& b) {
  Four out;
  GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) out.x[i] = a.x[i] * b.x[i];
  return out;
}

// sum + a * b, rounded once.
GENGRAM_THREAD Four add_product(const Four& sum, const Four& a, const Four& b) {
  Four out;
  GENGRAM_UNROLL for (int i = 0; i < kColumns; i++) out.x[i] = fmaf(a.x[i], b.x[i], sum.x[i]);
  return out;
}

GENGRAM_THREAD Four add_product(const Four& sum, const Four& a, float b) { return add_product(sum, a, filled(b)); }

// The sum over the columns of a * b.
GENGRAM_THREAD float dot(const Four& a, const Four& b) {
  float sum = a.x[0] * b.x[0];
  GENGRAM_UNROLL for (int i = 1; i < kColumns; i++) sum = fmaf(a.x[i], b.x[i], sum);
  return sum;
}

// 1 / x for x >= 1, to two units in the last place.
GENGRAM_THREAD float reciprocal(float x) {
#if defined(__CUDACC__)
  return __fdividef(1.f, x);
#else
  return 1.f / x;
#endif
}

// ---- loads and stores; `load_once` and `store_once` are for what is not read again soon

#if defined(__CUDACC__)

__device__ __forceinline__ Four unpacked(const float4& p) { return {{p.x, p.y, p.z, p.w}}; }

__device__ __forceinline__ Four unpacked(const uint2& p, BFloat16) {
  return {{__uint_as_float(p.x << 16), __uint_as_float(p.x & 0xffff0000u), __uint_as_float(p.y << 16),
           __uint_as_float(p.y & 0xffff0000u)}};
}

__device__ __forceinline__ Four unpacked(const uint2& p, Half) {
  __half2 a, b;
  memcpy(&a, &p.x, 4);
  memcpy(&b, &p.y, 4);
  const float2 low = __half22float2(a), high = __half22float2(b);
  return {{low.x, low.y, high.x, high.y}};
}

__device__ __forceinline__ Four load(const float* p) { return unpacked(__ldg(reinterpret_cast<const float4*>(p))); }
__device__ __forceinline__ Four load_once(const float* p) { return unpacked(__ldcs(reinterpret_cast<const float4*>(p))); }
// What an earlier phase or block of the same kernel may have written must not take the read-only path.
__device__ __forceinline__ Four load_written(const float* p) { return unpacked(*reinterpret_cast<const float4*>(p)); }

template <class T>
__device__ __forceinline__ Four load(const T* p) {
  return unpacked(__ldg(reinterpret_cast<const uint2*>(p)), T{});
}
template <class T>
__device__ __forceinline__ Four load_once(const T* p) {
  return unpacked(__ldcs(reinterpret_cast<const uint2*>(p)), T{});
}

__device__ __forceinline__ uint2 packed(const Four& v, BFloat16) {
  const __nv_bfloat162 a = __floats2bfloat162_rn(v.x[0], v.x[1]), b = __floats2bfloat162_rn(v.x[2], v.x[3]);
  uint2 out;
  memcpy(&out.x, &a, 4);
  memcpy(&out.y, &b, 4);
  return out;
}

__device__ __forceinline__ uint2 packed(const Four& v, Half) {
  const __half2 a = __floats2half2_rn(v.x[0], v.x[1]), b = __floats2half2_rn(v.x[2], v.x[3]);
  uint2 out;
  memcpy(&out.x, &a, 4);
  memcpy(&out.y, &b, 4);
  return out;
}

__device__ __forceinline__ void store(float* p, const Four& v) {
  *reinterpret_cast<float4*>(p) = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
}
__device__ __forceinline__ void store_once(float* p, const Four& v) {
  __stcs(reinterpret_cast<float4*>(p), make_float4(v.x[0], v.x[1], v.x[2], v.x[3]));
}
template <class T>
__device__ __forceinline__ void store_once(T* p, const Four& v) {
  __stcs(reinterpret_cast<uint2*>(p), packed(v, T{}));
}

#else

inline float value_of(float x) { return x; }
inline float value_of(Half x) { return half_value(x.bits); }
inline float value_of(BFloat16 x) { return bfloat16_value(x.bits); }
inline void assign(float& x, float value) { x = value; }
inline void assign(Half& x, float value) { x.bits = half_bits(value); }
inline void assign(BFloat16& x, float value) { x.bits = bfloat16_bits(value); }

template <class T>
Four load(const T* p) {
  Four out;
  for (int i = 0; i < kColumns; i++) out.x[i] = value_of(p[i]);
  return out;
}
template <class T>
Four load_once(const T* p) {
  return load(p);
}
inline Four load_written(const float* p) { return load(p); }

template <class T>
void store(T* p, const Four& v) {
  for (int i = 0; i < kColumns; i++) assign(p[i], v.x[i]);
}
template <class T>
void store_once(T* p, const Four& v) {
  store(p, v);
}

#endif

// ---- threads

#if defined(__CUDACC__)

struct Thread {
  int index, threads;  // of the block
  int64_t x, y;        // the block's place in the grid
  unsigned char* shared;

  // Writes the sum over the warp's threads; all of them must call, with the same `out` or null.
  __device__ __forceinline__ void sum(float value, float* out) const {
    GENGRAM_UNROLL for (int width = kWarp / 2; width; width /= 2) value += __shfl_xor_sync(~0u, value, width);
    if (out && index % kWarp == 0) *out = value;
  }

  // The same for eight values at once, by halving their number along with the threads: nine shuffles, not forty.
  // The additions are those of `sum`.
  __device__ __forceinline__ void sum_eight(const float (&values)[8], float* out, int64_t stride) const {
    float four[4], two[2];
    bool upper = index & 16;
    GENGRAM_UNROLL for (int i = 0; i < 4; i++)
      four[i] = (upper ? values[i + 4] : values[i]) + __shfl_xor_sync(~0u, upper ? values[i] : values[i + 4], 16);
    upper = index & 8;
    GENGRAM_UNROLL for (int i = 0; i < 2; i++)
      two[i] = (upper ? four[i + 2] : four[i]) + __shfl_xor_sync(~0u, upper ? four[i] : four[i + 2], 8);
    upper = index & 4;
    float one = (upper ? two[1] : two[0]) + __shfl_xor_sync(~0u, upper ? two[0] : two[1], 4);
    one += __shfl_xor_sync(~0u, one, 2);
    one += __shfl_xor_sync(~0u, one, 1);
    const int which = (index >> 4 & 1) * 4 + (index >> 3 & 1) * 2 + (index >> 2 & 1);
    if (out && (index & 3) == 0) out[which * stride] = one;
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks) run(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Thread thread{int(threadIdx.x), int(blockDim.x), int64_t(blockIdx.x), int64_t(blockIdx.y), shared};
  kernel.template phase<0>(thread);
  if constexpr (Kernel::kPhases > 1) {
    __syncthreads();
    kernel.template phase<1>(thread);
  }
}

#else

// What the threads of a warp hand in to be summed, call by call; the last thread adds up, as the shuffles would.
struct Lanes {
  struct Call {
    float values[kWarp];
    float* out;
  };
  std::vector<Call> calls;
  size_t next = 0;

  void add(int lane, float value, float* out) {
    if (next == calls.size()) calls.emplace_back();
    calls[next].values[lane] = value;
    calls[next++].out = out;
  }
  void finish() {
    for (Call& call : calls) {
      for (int width = kWarp / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) call.values[lane] += call.values[lane + width];
      if (call.out) *call.out = call.values[0];
    }
    calls.clear();
  }
};

struct Thread {
  int index, threads;
  int64_t x, y;
  unsigned char* shared;
  Lanes* lanes;

  void sum(float value, float* out) const { lanes->add(index % kWarp, value, out); }
  void sum_eight(const float (&values)[8], float* out, int64_t stride) const {
    for (int i = 0; i < 8; i++) sum(values[i], out ? out + i * stride : nullptr);
  }
};

template <int kPhase, class Kernel>
void run_phase(const Kernel& kernel, int64_t x, int64_t y, int threads, unsigned char* shared) {
  Lanes lanes;
  for (int index = 0; index < threads; index++) {
    lanes.next = 0;
    kernel.template phase<kPhase>(Thread{index, threads, x, y, shared, &lanes});
    if (index % kWarp == kWarp - 1) lanes.finish();
  }
}

#endif

// Runs a grid of (x, y) blocks. Returns CUDA's error code, 0 if there is none.
template <class Kernel>
int launch(const Kernel& kernel, int64_t x, int64_t y, int threads, int64_t shared_bytes, void* stream) {
  if (x <= 0 || y <= 0) return 0;
#if defined(__CUDACC__)
  if (shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
  run<Kernel><<<grid, threads, size_t(shared_bytes), static_cast<cudaStream_t>(stream)>>>(kernel);
  return cudaGetLastError();
#else
  (void)stream;
  for (int64_t b = 0; b < y; b++)
    for (int64_t a = 0; a < x; a++) {
      std::vector<Four> shared(size_t(shared_bytes + 15) / 16 + 1, filled(NAN));  // nothing may rely on what it holds
      unsigned char* memory = reinterpret_cast<unsigned char*>(shared.data());
      run_phase<0>(kernel, a, b, threads, memory);
      if constexpr (Kernel::kPhases > 1) run_phase<1>(kernel, a, b, threads, memory);
    }
  return 0;
#endif
}

}  // namespace GENGRAM_CAPABILITY
}  // namespace gengram
