// The memory's CPU kernels. Compiled once per instruction set (GENGRAM_CAPABILITY); vectors are GCC's portable ones.
//
// Work is cut in blocks of columns: a block's part of the tables stays in the cache while a thread sweeps over the
// positions. Forward: pass 1 gives three sums per position and block, from which come the gates; pass 2 gives values,
// convolution and result. Every sum is formed in an order that depends neither on threads nor on where a sweep began.
#if defined(GENGRAM_BUILDER) && !defined(GENGRAM_CAPABILITY)
#define GENGRAM_CAPABILITY baseline
#endif

#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../half.h"
#include "../motif_memory.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace gengram {
inline namespace GENGRAM_CAPABILITY {
namespace {

constexpr int kLanes = 16;
constexpr int kAhead = 6;  // positions that rows are fetched ahead of their use
typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Bits16 __attribute__((vector_size(32)));

inline Vec broadcast(float x) { return Vec{} + x; }

// ---- loads and stores of 16 numbers

inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline Vec load(const BFloat16* p) {
  Bits16 narrow;
  memcpy(&narrow, p, sizeof narrow);
  const Bits wide = __builtin_convertvector(narrow, Bits) << 16;
  Vec x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  Vec x;
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1));
  memcpy(&x, &low, sizeof low);
  memcpy(reinterpret_cast<char*>(&x) + sizeof low, &high, sizeof high);
  return x;
#else
  Bits16 narrow;
  memcpy(&narrow, p, sizeof narrow);
  const Bits h = __builtin_convertvector(narrow, Bits);
  const Bits sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  const Bits special = (Bits)((h & 0x7c00u) == 0x7c00u);
  Bits bits = (rest & ~special) | ((rest | 0x7f800000u) & special);  // infinity and NaN keep the largest exponent
  Vec x;
  memcpy(&x, &bits, sizeof x);
  Vec scaled = x * 0x1p112f;
  Bits scaled_bits;
  memcpy(&scaled_bits, &scaled, sizeof scaled_bits);
  bits = (scaled_bits & ~special) | (bits & special) | sign;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

inline void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }

inline void store(BFloat16* p, Vec x) {
  Bits bits;
  memcpy(&bits, &x, sizeof bits);
  const Bits is_nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40u;
  const Bits16 narrow = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), Bits16);
  memcpy(p, &narrow, sizeof narrow);
}

inline void store(Half* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; i++) p[i].bits = half_bits(x[i]);
#endif
}

template <class T>
inline void prefetch(const T* p, int vectors) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (size_t i = 0; i < sizeof(T) * kLanes * vectors; i += 64) __builtin_prefetch(bytes + i);
}

// ---- functions

inline float sum_lanes(Vec x) {
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
}

// e^x to 2e-7 relative; Cephes' polynomial after reduction by multiples of ln 2.
inline Vec exponential(Vec x) {
  x = x < -87.f ? broadcast(-87.f) : x;
  x = x > 88.f ? broadcast(88.f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const Vec n = shifted - 12582912.f;
  const Vec f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  Vec power;
  memcpy(&power, &exponent, sizeof power);
  return p * power;
}

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exponential(-x)); }

// Zeroed memory, aligned to a cache line; aborts when there is none, as new would.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data_) abort();
    memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data_[i]; }
  T* get() { return data_; }
  void clear(int64_t count) { memset(static_cast<void*>(data_), 0, size_t(count) * sizeof(T)); }

 private:
  T* data_;
};

template <class F>
void parallel_for(Parallel parallel, int64_t count, F f) {
  parallel(count, [](void* context, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) (*static_cast<F*>(context))(i);
  }, &f);
}

// ---- where keys and values come from, one block of columns at a time

// Sums of packed rows over the windows of consecutive positions.
template <class T, int kEndings>
class WindowSums {
 public:
  // `rows` points at the block's first column of row 0.
  WindowSums(const Geometry& geometry, const T* rows, int64_t row_stride, float scale, int vectors)
      : g_(geometry), rows_(rows), row_stride_(row_stride), factor_(1.f / scale), vectors_(vectors),
        ring_(int64_t(ring_entries(geometry.endings)) * vectors) {}

  // The next position asked for is t.
  void start(const Sequence& s, int64_t t) {
    s_ = s;
    const int64_t end = window_end(g_, s_, t);
    for (int64_t j = larger(end - g_.endings + 1, 0); j < smaller(end, s_.tokens); j++) push<false>(j, nullptr);
  }

  // One position on its own, without a sweep: the additions of push_row, in its order.
  void only(const Sequence& s, int64_t t, Vec* out) {
    s_ = s;
    if (!kEndings || (kEndings & (kEndings - 1)) || !is_regular(g_, s_, t)) {
      start(s, t);
      at(t, out);
      return;
    }
    const int64_t end = window_end(g_, s_, t);
    const T* oldest = g_.largest > 1 ? row(oldest_row(g_, s_, t)) : nullptr;
    for (int i = 0; i < vectors_; i++) {
      Vec sums[kEndings ? kEndings : 1];
      for (int k = 0; k < kEndings; k++) sums[k] = load(row(s_.top[end - k]) + kLanes * i);
      for (int count = kEndings / 2; count; count /= 2)
        for (int k = 0; k < count; k++) sums[k] = sums[2 * k] + sums[2 * k + 1];
      out[i] = oldest ? sums[0] + load(oldest + kLanes * i) : sums[0];
      if (factor_ != 1.f) out[i] *= factor_;
    }
  }

  void at(int64_t t, Vec* out) {
    const int64_t end = window_end(g_, s_, t);
    const bool regular = is_regular(g_, s_, t);
    if (end + kAhead < s_.tokens) {
      prefetch(row(s_.top[end + kAhead]), vectors_);
      if (g_.largest > 1 && end + kAhead >= g_.endings) prefetch(row(oldest_row(g_, s_, t + kAhead)), vectors_);
    }
    if (end < s_.tokens) {
      if (regular)
        push<true>(end, out);
      else
        push<false>(end, nullptr);
    }
    if (regular) {
      if (g_.largest > 1) {
        const T* oldest = row(oldest_row(g_, s_, t));
        for (int i = 0; i < vectors_; i++) out[i] += load(oldest + kLanes * i);
      }
    } else {
      for (int i = 0; i < vectors_; i++) out[i] = Vec{};
      for_each_irregular_row(g_, s_, t, [&](int32_t index, float weight) {
        const T* p = row(index);
        for (int i = 0; i < vectors_; i++) out[i] += load(p + kLanes * i) * weight;
      });
    }
    if (factor_ != 1.f)
      for (int i = 0; i < vectors_; i++) out[i] *= factor_;
  }

 private:
  const T* row(int32_t index) const { return rows_ + index * row_stride_; }

  template <bool kIsWanted>
  inline void push(int64_t j, Vec* out) {
    const T* p = row(s_.top[j]);
    for (int i = 0; i < vectors_; i++) {
      const Vec total = push_row<kEndings>(load(p + kLanes * i), ring_.get() + i, vectors_, g_.endings, j);
      if (kIsWanted) out[i] = total;
    }
  }

  const Geometry g_;
  const T* rows_;
  const int64_t row_stride_;
  const float factor_;
  const int vectors_;
  Buffer<Vec> ring_;
  Sequence s_;
};

// Keys or values that are there already.
template <class T>
class Given {
 public:
  Given(const T* columns, int64_t hidden, int vectors) : columns_(columns), hidden_(hidden), vectors_(vectors) {}
  void start(const Sequence&, int64_t) {}
  void of_row(const T* columns) { columns_ = columns; }
  void only(const Sequence&, int64_t t, Vec* out) { at(t, out); }
  void at(int64_t t, Vec* out) {
    for (int i = 0; i < vectors_; i++) out[i] = load(columns_ + t * hidden_ + kLanes * i);
  }

 private:
  const T* columns_;
  const int64_t hidden_;
  const int vectors_;
};

// ---- where the gradients of keys and values go

// Gradients of packed rows: the transpose of WindowSums. Positions must come in order, from 0 to the last.
template <int kEndings>
class WindowSumsGradient {
 public:
  WindowSumsGradient(const Geometry& geometry, float* rows, int64_t row_stride, float scale, int vectors)
      : g_(geometry), rows_(rows), row_stride_(row_stride), factor_(1.f / scale), vectors_(vectors),
        ring_(int64_t(ring_entries(geometry.endings)) * vectors) {}

  void start(const Sequence& s) {
    s_ = s;
    ring_.clear(int64_t(ring_entries(g_.endings)) * vectors_);
  }

  void add(int64_t t, const Vec* grad) {
    const int64_t end = window_end(g_, s_, t);
    if (!is_regular(g_, s_, t)) {
      push(end, nullptr);
      for_each_irregular_row(g_, s_, t, [&](int32_t index, float weight) {
        float* p = row(index);
        for (int i = 0; i < vectors_; i++) store(p + kLanes * i, load(p + kLanes * i) + grad[i] * (weight * factor_));
      });
      return;
    }
    push(end, grad);
    if (g_.largest > 1) {
      float* p = row(oldest_row(g_, s_, t));
      for (int i = 0; i < vectors_; i++) store(p + kLanes * i, load(p + kLanes * i) + grad[i] * factor_);
    }
  }

  void finish() {
    const int64_t end = window_end(g_, s_, s_.length);
    for (int64_t j = end; j < end + g_.endings - 1; j++) push(j, nullptr);
  }

 private:
  float* row(int32_t index) { return rows_ + index * row_stride_; }

  // All windows that hold the n-gram which ends `endings - 1` tokens before `end` are known now.
  void push(int64_t end, const Vec* grad) {
    const int64_t j = end - g_.endings + 1;
    const bool is_wanted = j >= 0 && j < s_.tokens;
    float* p = is_wanted ? row(s_.top[j]) : nullptr;
    for (int i = 0; i < vectors_; i++) {
      const Vec value = grad ? grad[i] * factor_ : Vec{};
      const Vec total = push_row<kEndings>(value, ring_.get() + i, vectors_, g_.endings, end);
      if (is_wanted) store(p + kLanes * i, load(p + kLanes * i) + total);
    }
  }

  const Geometry g_;
  float* rows_;
  const int64_t row_stride_;
  const float factor_;
  const int vectors_;
  Buffer<Vec> ring_;
  Sequence s_;
};

class GivenGradient {
 public:
  GivenGradient(int64_t hidden, int vectors) : hidden_(hidden), vectors_(vectors) {}
  void of_row(float* columns) { columns_ = columns; }
  void start(const Sequence&) {}
  void add(int64_t t, const Vec* grad) {
    for (int i = 0; i < vectors_; i++) store(columns_ + t * hidden_ + kLanes * i, grad[i]);
  }
  void finish() {}

 private:
  float* columns_ = nullptr;
  const int64_t hidden_;
  const int vectors_;
};

// ---- forward

constexpr int64_t kTile = 512;            // positions of one task
constexpr int64_t kChunk = 65536;         // positions whose sums are kept at a time
constexpr int kMaxVectors = 16;           // of a block

// Makes sources and sinks for a block of key (side 0) or value (side 1) columns.
template <class T, int kEndings>
struct FromTables {
  using Keys = WindowSums<T, kEndings>;
  using Gradients = WindowSumsGradient<kEndings>;
  const Tables& tables;
  const Geometry geometry;
  int64_t hidden;

  Keys keys(int side, int64_t column, int vectors) const {
    const int64_t at = side * hidden + column;
    const T* rows = static_cast<const T*>(tables.rows) + at / tables.slab_width * tables.slab_stride + at % tables.slab_width;
    return Keys(geometry, rows, tables.row_stride, tables.scale, vectors);
  }
  void select(Keys&, int, int64_t, int64_t) const {}

  Gradients gradients(const BackwardArguments& a, int side, int64_t column, int vectors) const {
    const int64_t at = side * hidden + column;
    float* rows = a.grad_rows + at / tables.slab_width * (geometry.rows * tables.slab_width) + at % tables.slab_width;
    return Gradients(geometry, rows, tables.slab_width, tables.scale, vectors);
  }
  void select(Gradients&, const BackwardArguments&, int, int64_t, int64_t) const {}
};

template <class T>
struct FromTensors {
  using Keys = Given<T>;
  using Gradients = GivenGradient;
  const Source& source;
  int64_t hidden, length;

  const T* place(int side, int64_t row, int64_t column) const {
    return static_cast<const T*>(side ? source.value : source.key) + row * length * hidden + column;
  }
  Keys keys(int side, int64_t column, int vectors) const { return Keys(place(side, 0, column), hidden, vectors); }
  void select(Keys& keys, int side, int64_t row, int64_t column) const { keys.of_row(place(side, row, column)); }
  Gradients gradients(const BackwardArguments&, int, int64_t, int vectors) const { return Gradients(hidden, vectors); }
  void select(Gradients& gradients, const BackwardArguments& a, int side, int64_t row, int64_t column) const {
    gradients.of_row((side ? a.grad_value : a.grad_key) + row * length * hidden + column);
  }
};

struct Blocks {
  int64_t width, count;
  int vectors;
};

Blocks blocks_of(int64_t hidden, int64_t width) { return {width, hidden / width, int(width / kLanes)}; }

// Sums of one block for the gates of positions begin..end of a row of the batch.
template <class X, class Keys>
void gate_sums(Keys& keys, const Sequence& s, const X* hidden_states, int64_t hidden, const float* norm_weight, int vectors, int64_t begin,
               int64_t end, GateSums* sums, int64_t stride) {
  Vec key[kMaxVectors];
  for (int64_t t = begin; t < end; t++) {
    const X* query = hidden_states + t * hidden;
    if (t + kAhead < end) prefetch(query + kAhead * hidden, vectors);
    if (end - begin == 1)
      keys.only(s, t, key);
    else
      keys.at(t, key);
    Vec key_square{}, product{}, query_square{};
    for (int i = 0; i < vectors; i++) {
      const Vec q = load(query + kLanes * i), k = key[i];
      key_square += k * k;
      product += q * load(norm_weight + kLanes * i) * k;
      query_square += q * q;
    }
    *sums = {sum_lanes(key_square), sum_lanes(product), sum_lanes(query_square)};
    sums += stride;
  }
}

GateSums add_blocks(const GateSums* sums, int64_t blocks) {
  GateSums total = sums[0];
  for (int64_t i = 1; i < blocks; i++) {
    total.key_square += sums[i].key_square;
    total.product += sums[i].product;
    total.query_square += sums[i].query_square;
  }
  return total;
}

// Gates of positions begin..end of every row, given to consume(row, t, gate).
template <class X, class Origin, class F>
void for_each_gate(const Origin& origin, const Tokens& tokens, const Layer& layer, const X* hidden_states, int64_t begin,
                   int64_t end, const Blocks& blocks, Parallel parallel, F consume) {
  const int64_t length = end - begin, tiles = (length + kTile - 1) / kTile;
  if (length <= 0) return;
  Buffer<GateSums> sums(tokens.batch * length * blocks.count);
  parallel_for(parallel, blocks.count * tokens.batch * tiles, [&](int64_t task) {
    const int64_t block = task / (tokens.batch * tiles), row = task / tiles % tokens.batch, tile = task % tiles;
    const int64_t first = begin + tile * kTile, last = smaller(first + kTile, end), column = block * blocks.width;
    auto keys = origin.keys(0, column, blocks.vectors);
    origin.select(keys, 0, row, column);
    const Sequence s = sequence_of(tokens, row);
    if (last - first > 1) keys.start(s, first);
    gate_sums(keys, s, hidden_states + row * tokens.length * layer.hidden + column, layer.hidden, layer.norm_weight + column,
              blocks.vectors, first, last, &sums[(row * length + first - begin) * blocks.count + block], blocks.count);
  });
  for (int64_t row = 0; row < tokens.batch; row++)
    for (int64_t t = begin; t < end; t++)
      consume(row, t, make_gate(add_blocks(&sums[(row * length + t - begin) * blocks.count], blocks.count), layer.hidden, layer.eps));
}

template <class X, class Origin>
void value_tile(const ForwardArguments& a, const Origin& origin, const Blocks& blocks, int64_t row, int64_t block,
                int64_t begin, int64_t end, typename Origin::Keys& values, Buffer<Vec>& inputs) {
  const Layer& layer = a.layer;
  const Sequence s = sequence_of(a.tokens, row);
  const int64_t hidden = layer.hidden, length = a.tokens.length, column = block * blocks.width;
  const int64_t reach = layer.conv_weight ? (layer.taps - 1) * layer.dilation : 0;
  const int64_t reach_back = layer.conv_weight ? layer.reach_back : 0, reach_ahead = reach - reach_back;
  const int64_t slots = reach + 1;
  const int vectors = blocks.vectors;
  X* residual = static_cast<X*>(a.residual) + row * length * hidden + column;
  const float* gates = a.gate + row * length;
  origin.select(values, 1, row, column);
  const bool is_only = length == 1;
  if (!is_only) values.start(s, larger(begin - reach_back, 0));
  for (int64_t newest = begin - reach_back; newest < end + reach_ahead; newest++) {
    Vec* input = &inputs[(newest + slots) % slots * vectors];
    if (newest < 0) {
      const float* past = a.history ? a.history + (row * reach_back + reach_back + newest) * hidden + column : nullptr;
      for (int i = 0; i < vectors; i++) input[i] = past ? load(past + kLanes * i) : Vec{};
    } else if (newest >= length) {
      for (int i = 0; i < vectors; i++) input[i] = Vec{};
    } else {
      if (is_only)
        values.only(s, newest, input);
      else
        values.at(newest, input);
      const float strength = s.exists && !s.exists[newest] ? 0.f : gates[newest];
      for (int i = 0; i < vectors; i++) input[i] *= strength;
      if (newest >= length - a.kept && newest >= begin && newest < end) {
        float* kept = a.gated + (row * a.kept + newest - (length - a.kept)) * hidden + column;
        for (int i = 0; i < vectors; i++) store(kept + kLanes * i, input[i]);
      }
    }
    const int64_t t = newest - reach_ahead;
    if (t < begin) continue;
    const Vec* own = &inputs[(t + slots) % slots * vectors];
    if (!layer.conv_weight) {
      for (int i = 0; i < vectors; i++) store(residual + t * hidden + kLanes * i, own[i]);
      continue;
    }
    Vec taps[kMaxVectors];
    for (int i = 0; i < vectors; i++) taps[i] = Vec{};
    for (int64_t tap = 0; tap < layer.taps; tap++) {
      const int64_t offset = tap * layer.dilation - reach_back;
      if (!is_in_segment(s, t, offset)) continue;
      const Vec* x = &inputs[(t + offset + slots) % slots * vectors];
      const float* weight = layer.conv_weight + tap * hidden + column;
      for (int i = 0; i < vectors; i++) taps[i] += x[i] * load(weight + kLanes * i);
    }
    for (int i = 0; i < vectors; i++) store(residual + t * hidden + kLanes * i, own[i] + taps[i] * sigmoid(taps[i]));
  }
}

template <class X, class Origin>
void forward_from(const ForwardArguments& a, const Origin& origin, const Blocks& blocks, Parallel parallel) {
  const Tokens& tokens = a.tokens;
  const Layer& layer = a.layer;
  const int64_t reach = layer.conv_weight ? (layer.taps - 1) * layer.dilation : 0;
  const int64_t reach_ahead = layer.conv_weight ? reach - layer.reach_back : 0;
  const int64_t chunk = larger(kChunk / larger(tokens.batch, 1), kTile);
  int64_t gated = 0;  // positions whose gates are known
  for (int64_t begin = 0; begin < tokens.length; begin += chunk) {
    const int64_t end = smaller(begin + chunk, tokens.length), needed = smaller(end + reach_ahead, tokens.length);
    for_each_gate(origin, tokens, layer, static_cast<const X*>(a.hidden_states), gated, needed, blocks, parallel,
                  [&](int64_t row, int64_t t, const Gate& gate) { a.gate[row * tokens.length + t] = gate.gate; });
    gated = needed;
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
    parallel_for(parallel, blocks.count * tokens.batch * tiles, [&](int64_t task) {
      const int64_t block = task / (tokens.batch * tiles), row = task / tiles % tokens.batch, tile = task % tiles;
      Buffer<Vec> inputs((reach + 1) * blocks.vectors);
      auto values = origin.keys(1, block * blocks.width, blocks.vectors);
      const int64_t first = begin + tile * kTile;
      value_tile<X>(a, origin, blocks, row, block, first, smaller(first + kTile, end), values, inputs);
    });
  }
}

// ---- backward

// Gradients of value and convolution for a block, in order; consume(t, sum over the block of grad_gated * value).
template <class X, class Origin, class F>
void value_gradients(const BackwardArguments& a, const Origin& origin, const Blocks& blocks, int64_t block, int64_t row,
                     const Gate* gates, typename Origin::Gradients& gradients, Vec* grad_conv, F consume) {
  const Layer& layer = a.layer;
  const Sequence s = sequence_of(a.tokens, row);
  const int64_t hidden = layer.hidden, length = s.length, column = block * blocks.width;
  const int64_t reach = layer.conv_weight ? (layer.taps - 1) * layer.dilation : 0;
  const int64_t reach_back = layer.conv_weight ? layer.reach_back : 0, reach_ahead = reach - reach_back;
  const int vectors = blocks.vectors;
  const int64_t tile = larger(128, 2 * reach);
  Buffer<Vec> values((tile + 2 * reach) * vectors), taps((tile + reach) * vectors);
  auto source = origin.keys(1, column, vectors);
  origin.select(source, 1, row, column);
  const X* grad_residual = static_cast<const X*>(a.grad_residual) + row * length * hidden + column;
  auto strength = [&](int64_t t) { return s.exists && !s.exists[t] ? 0.f : gates[t].gate; };
  for (int64_t begin = 0; begin < length; begin += tile) {
    const int64_t end = smaller(begin + tile, length);
    const int64_t first_tap = larger(begin - reach_ahead, 0), last_tap = smaller(end + reach_back, length);
    const int64_t first = larger(first_tap - reach_back, 0), last = smaller(last_tap + reach_ahead, length);
    source.start(s, first);
    for (int64_t t = first; t < last; t++) source.at(t, &values[(t - first) * vectors]);
    for (int64_t t = first_tap; layer.conv_weight && t < last_tap; t++) {
      Vec* grad = &taps[(t - first_tap) * vectors];
      for (int i = 0; i < vectors; i++) grad[i] = Vec{};
      for (int64_t tap = 0; tap < layer.taps; tap++) {
        const int64_t offset = tap * layer.dilation - reach_back, other = t + offset;
        if (other < 0 || other >= length || !is_in_segment(s, t, offset)) continue;
        const Vec* x = &values[(other - first) * vectors];
        const float* weight = layer.conv_weight + tap * hidden + column;
        const float scale = strength(other);
        for (int i = 0; i < vectors; i++) grad[i] += x[i] * scale * load(weight + kLanes * i);
      }
      for (int i = 0; i < vectors; i++) {
        const Vec sigma = sigmoid(grad[i]);
        grad[i] = load(grad_residual + t * hidden + kLanes * i) * sigma * (1.f + grad[i] * (1.f - sigma));
      }
    }
    for (int64_t t = begin; t < end; t++) {
      Vec grad[kMaxVectors];
      for (int i = 0; i < vectors; i++) grad[i] = load(grad_residual + t * hidden + kLanes * i);
      for (int64_t tap = 0; layer.conv_weight && tap < layer.taps; tap++) {
        const int64_t offset = tap * layer.dilation - reach_back;
        const float* weight = layer.conv_weight + tap * hidden + column;
        const int64_t reader = t - offset, other = t + offset;
        if (reader >= 0 && reader < length && is_in_segment(s, reader, offset)) {
          const Vec* x = &taps[(reader - first_tap) * vectors];
          for (int i = 0; i < vectors; i++) grad[i] += x[i] * load(weight + kLanes * i);
        }
        if (other >= 0 && other < length && is_in_segment(s, t, offset)) {
          const Vec *x = &values[(other - first) * vectors], *y = &taps[(t - first_tap) * vectors];
          const float scale = strength(other);
          for (int i = 0; i < vectors; i++) grad_conv[tap * vectors + i] += y[i] * (x[i] * scale);
        }
      }
      Vec product{};
      const Vec* value = &values[(t - first) * vectors];
      for (int i = 0; i < vectors; i++) product += grad[i] * value[i];
      consume(t, sum_lanes(product));
      const float scale = strength(t);
      for (int i = 0; i < vectors; i++) grad[i] *= scale;
      gradients.add(t, grad);
    }
  }
}

template <class X, class Origin>
void key_gradients(const BackwardArguments& a, const Origin& origin, const Blocks& blocks, int64_t block, int64_t row,
                   const GateGradient* factors, typename Origin::Gradients& gradients, Vec* grad_norm) {
  const Layer& layer = a.layer;
  const Sequence s = sequence_of(a.tokens, row);
  const int64_t hidden = layer.hidden, column = block * blocks.width;
  const int vectors = blocks.vectors;
  auto keys = origin.keys(0, column, vectors);
  origin.select(keys, 0, row, column);
  keys.start(s, 0);
  const int64_t start = row * s.length * hidden + column;
  const X* queries = static_cast<const X*>(a.hidden_states) + start;
  X* grad_queries = static_cast<X*>(a.grad_hidden) + start;
  const float* norm_weight = layer.norm_weight + column;
  Vec key[kMaxVectors];
  for (int64_t t = 0; t < s.length; t++) {
    keys.at(t, key);
    const GateGradient& f = factors[t];
    for (int i = 0; i < vectors; i++) {
      const Vec k = key[i], q = load(queries + t * hidden + kLanes * i), w = load(norm_weight + kLanes * i) * f.product;
      store(grad_queries + t * hidden + kLanes * i, w * k + f.query * q);
      grad_norm[i] += f.product * q * k;
      key[i] = w * q + f.key * k;
    }
    gradients.add(t, key);
  }
}

template <class X, class Origin>
void backward_from(const BackwardArguments& a, const Origin& origin, const Blocks& blocks, Parallel parallel) {
  const Tokens& tokens = a.tokens;
  const Layer& layer = a.layer;
  const int64_t positions = tokens.batch * tokens.length;
  Buffer<Gate> gates(positions);
  const int64_t chunk = larger(kChunk / larger(tokens.batch, 1), kTile);
  for (int64_t begin = 0; begin < tokens.length; begin += chunk)
    for_each_gate(origin, tokens, layer, static_cast<const X*>(a.hidden_states), begin, smaller(begin + chunk, tokens.length),
                  blocks, parallel, [&](int64_t row, int64_t t, const Gate& gate) { gates[row * tokens.length + t] = gate; });
  Buffer<float> products(positions * blocks.count);
  parallel_for(parallel, blocks.count, [&](int64_t block) {
    const int64_t column = block * blocks.width;
    Buffer<Vec> grad_conv(layer.taps * blocks.vectors);
    auto gradients = origin.gradients(a, 1, column, blocks.vectors);
    for (int64_t row = 0; row < tokens.batch; row++) {
      origin.select(gradients, a, 1, row, column);
      gradients.start(sequence_of(tokens, row));
      value_gradients<X>(a, origin, blocks, block, row, &gates[row * tokens.length], gradients, grad_conv.get(),
                         [&](int64_t t, float product) { products[(row * tokens.length + t) * blocks.count + block] = product; });
      gradients.finish();
    }
    for (int64_t tap = 0; a.grad_conv && tap < layer.taps; tap++)
      for (int i = 0; i < blocks.vectors; i++)
        store(a.grad_conv + tap * layer.hidden + column + kLanes * i, grad_conv[tap * blocks.vectors + i]);
  });
  Buffer<GateGradient> factors(positions);
  for (int64_t i = 0; i < positions; i++) {
    float grad = 0.f;
    for (int64_t block = 0; block < blocks.count; block++) grad += products[i * blocks.count + block];
    if (tokens.exists && !tokens.exists[i]) grad = 0.f;
    if (a.grad_gate) grad += a.grad_gate[i];
    factors[i] = differentiate_gate(gates[i], grad, layer.hidden);
  }
  parallel_for(parallel, blocks.count, [&](int64_t block) {
    const int64_t column = block * blocks.width;
    Buffer<Vec> grad_norm(blocks.vectors);
    auto gradients = origin.gradients(a, 0, column, blocks.vectors);
    for (int64_t row = 0; row < tokens.batch; row++) {
      origin.select(gradients, a, 0, row, column);
      gradients.start(sequence_of(tokens, row));
      key_gradients<X>(a, origin, blocks, block, row, &factors[row * tokens.length], gradients, grad_norm.get());
      gradients.finish();
    }
    for (int i = 0; i < blocks.vectors; i++) store(a.grad_norm + column + kLanes * i, grad_norm[i]);
  });
}

// ---- choice of types

template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat: return f(static_cast<float*>(nullptr));
    case Type::kHalf: return f(static_cast<Half*>(nullptr));
    case Type::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
  }
}

template <class T>
T type_of(T*);

// Calls f(hidden's type, origin) with the origin that the arguments describe.
template <class Arguments, class F>
void with_origin(const Arguments& a, F f) {
  with_type(a.type, [&](auto* x) {
    if (!a.source.tables) {
      with_type(a.source.type, [&](auto* t) {
        using T = decltype(type_of(t));
        f(x, FromTensors<T>{a.source, a.layer.hidden, a.tokens.length});
      });
      return;
    }
    const Tables& tables = *a.source.tables;
    const Geometry g = make_geometry(a.windows.window, a.windows.largest, a.windows.last, a.windows.sizes, int32_t(tables.top_rows));
    with_type(tables.type, [&](auto* t) {
      using T = decltype(type_of(t));
      if (g.endings == 16)
        f(x, FromTables<T, 16>{tables, g, a.layer.hidden});
      else
        f(x, FromTables<T, 0>{tables, g, a.layer.hidden});
    });
  });
}

void forward(const ForwardArguments& a, Parallel parallel) {
  const Blocks blocks = blocks_of(a.layer.hidden, slab_width(a.layer.hidden));
  with_origin(a, [&](auto* x, const auto& origin) { forward_from<decltype(type_of(x))>(a, origin, blocks, parallel); });
}

void backward(const BackwardArguments& a, Parallel parallel) {
  const Blocks blocks = blocks_of(a.layer.hidden, smaller(slab_width(a.layer.hidden), 128));
  with_origin(a, [&](auto* x, const auto& origin) { backward_from<decltype(type_of(x))>(a, origin, blocks, parallel); });
}

// ---- rows and runs

void plan(const int64_t* codes, const int32_t* behind, int64_t batch, int64_t tokens, int largest, int32_t* grams,
          int32_t* runs, Parallel parallel) {
  parallel_for(parallel, batch, [&](int64_t row) {
    const int64_t start = row * tokens;
    int32_t letters = 0;  // consecutive ones, whatever their segment
    for (int64_t t = 0; t < tokens; t++) {
      letters = codes[start + t] > 0 ? letters + 1 : 0;
      const int64_t reach = behind ? larger(int64_t(behind[start + t]) + 1, 0) : tokens;
      runs[start + t] = int32_t(smaller(letters, reach));
      int32_t gram = 0;
      for (int64_t back = smaller(smaller(largest, t + 1), behind ? larger(reach, 1) : t + 1) - 1; back >= 0; back--) {
        const int64_t code = codes[start + t - back];
        gram = gram * 5 + int32_t(code > 0 ? code - 1 : 0);
      }
      grams[start + t] = gram;
    }
  });
}

// ---- window means of the tables as they are

// The n-grams of size n in the window of position t: the first and one past the last place where they may end.
struct Endings {
  int64_t first, stop;
};

inline Endings endings_of(const Geometry& g, const Sequence& s, int64_t t, int n) {
  const Span span = window_span(g, s, t);
  return {span.begin + n - 1, span.stop};
}

template <class T>
void features_of(const FeatureArguments& a, Parallel parallel) {
  const Geometry g = make_geometry(a.windows.window, a.windows.largest, a.windows.last, a.windows.sizes, 0);
  const int64_t width = a.width, length = a.tokens.length, tiles = (length + kTile - 1) / kTile;
  const Blocks blocks = blocks_of(width, slab_width(width));
  parallel_for(parallel, a.tables * blocks.count * a.tokens.batch * tiles, [&](int64_t task) {
    const int64_t tile = task % tiles, row = task / tiles % a.tokens.batch, block = task / (tiles * a.tokens.batch) % blocks.count;
    const int64_t table = task / (tiles * a.tokens.batch * blocks.count), column = block * blocks.width;
    const int n = a.sizes[table], endings = g.window - n + 1, vectors = blocks.vectors;
    const Sequence s = sequence_of(a.tokens, row);
    const T* rows = static_cast<const T*>(a.rows[table]) + column;
    T* out = static_cast<T*>(a.features) + (row * length * a.tables + table) * width + column;
    Buffer<Vec> ring(int64_t(ring_entries(endings)) * vectors);
    Vec mean[kMaxVectors];
    auto push = [&](int64_t j) {  // an n-gram that is none adds zero
      const T* p = rows + int64_t(s.grams[j] % g.power[n]) * width;
      const float one = s.runs[j] >= n ? 1.f : 0.f;
      for (int i = 0; i < vectors; i++)
        mean[i] = push_row<0>(load(p + kLanes * i) * one, ring.get() + i, vectors, endings, j);
    };
    const int64_t first = tile * kTile, last = smaller(first + kTile, length);
    for (int64_t j = larger(window_end(g, s, first) - endings + 1, 0); j < smaller(window_end(g, s, first), s.tokens); j++) push(j);
    for (int64_t t = first; t < last; t++) {
      const int64_t end = window_end(g, s, t);
      if (end < s.tokens) push(end);
      float factor = 1.f / float(endings);
      if (!is_regular(g, s, t)) {
        int count = 0;
        for (int i = 0; i < vectors; i++) mean[i] = Vec{};
        const Endings range = endings_of(g, s, t, n);
        for (int64_t j = range.first; j < range.stop; j++) {
          if (s.runs[j] < n) continue;
          const T* p = rows + int64_t(s.grams[j] % g.power[n]) * width;
          for (int i = 0; i < vectors; i++) mean[i] += load(p + kLanes * i);
          count++;
        }
        factor = count ? 1.f / float(count) : 0.f;
      }
      for (int i = 0; i < vectors; i++) store(out + t * a.tables * width + kLanes * i, mean[i] * factor);
    }
  });
}

template <class T>
void feature_gradients_of(const FeatureArguments& a, Parallel parallel) {
  const Geometry g = make_geometry(a.windows.window, a.windows.largest, a.windows.last, a.windows.sizes, 0);
  const int64_t width = a.width, length = a.tokens.length;
  const Blocks blocks = blocks_of(width, smaller(slab_width(width), 128));
  parallel_for(parallel, a.tables * blocks.count, [&](int64_t task) {
    const int64_t table = task / blocks.count, column = task % blocks.count * blocks.width;
    const int n = a.sizes[table], endings = g.window - n + 1, vectors = blocks.vectors;
    float* rows = a.grad_rows[table] + column;
    auto row_of = [&](const Sequence& s, int64_t j) { return rows + int64_t(s.grams[j] % g.power[n]) * width; };
    auto add = [&](float* p, Vec x, int i) { store(p + kLanes * i, load(p + kLanes * i) + x); };
    Buffer<Vec> ring(int64_t(ring_entries(endings)) * vectors);
    for (int64_t row = 0; row < a.tokens.batch; row++) {
      const Sequence s = sequence_of(a.tokens, row);
      const T* grad = static_cast<const T*>(a.grad_features) + (row * length * a.tables + table) * width + column;
      ring.clear(int64_t(ring_entries(endings)) * vectors);
      for (int64_t t = 0; t < length + endings - 1; t++) {
        const bool regular = t < length && is_regular(g, s, t);
        const int64_t end = window_end(g, s, t), j = end - endings + 1;
        const bool is_wanted = j >= 0 && j < s.tokens && s.runs[j] >= n;
        const T* own = grad + t * a.tables * width;
        for (int i = 0; i < vectors; i++) {
          const Vec x = regular ? load(own + kLanes * i) * (1.f / float(endings)) : Vec{};
          const Vec total = push_row<0>(x, ring.get() + i, vectors, endings, end);
          if (is_wanted) add(row_of(s, j), total, i);
        }
        if (t >= length || regular) continue;
        const Endings range = endings_of(g, s, t, n);
        int count = 0;
        for (int64_t k = range.first; k < range.stop; k++) count += s.runs[k] >= n;
        for (int64_t k = range.first; k < range.stop; k++)
          if (s.runs[k] >= n)
            for (int i = 0; i < vectors; i++) add(row_of(s, k), load(own + kLanes * i) * (1.f / float(count)), i);
      }
    }
  });
}

void features(const FeatureArguments& a, Parallel parallel) {
  with_type(a.type, [&](auto* t) { features_of<decltype(type_of(t))>(a, parallel); });
}

void features_backward(const FeatureArguments& a, Parallel parallel) {
  with_type(a.type, [&](auto* t) { feature_gradients_of<decltype(type_of(t))>(a, parallel); });
}

#include "experts.h"

}  // namespace
}  // namespace GENGRAM_CAPABILITY

#define GENGRAM_JOIN(a, b) a##b
#define GENGRAM_KERNELS(capability) GENGRAM_JOIN(kernels_, capability)
#define GENGRAM_TEXT(x) #x
#define GENGRAM_NAME(x) GENGRAM_TEXT(x)

const Kernels& GENGRAM_KERNELS(GENGRAM_CAPABILITY)() {
  static constexpr Kernels kernels = {GENGRAM_NAME(GENGRAM_CAPABILITY), plan, forward, backward, features, features_backward,
                                      product};
  return kernels;
}

}  // namespace gengram
