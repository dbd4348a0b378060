// The motif memory's arithmetic, the same for CPU (g++) and CUDA (nvcc): which rows a window reads, how their sums are
// formed, and the gate. Formulas: motif_memory/README.md. No PyTorch here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "arguments.h"

#if defined(__CUDACC__)
#define GENGRAM_BODY __host__ __device__ __forceinline__
#else
#define GENGRAM_BODY inline __attribute__((always_inline))
#endif

// The CPU's sources are compiled several times with different instruction sets; each gets its own names.
#ifndef GENGRAM_CAPABILITY
#define GENGRAM_CAPABILITY common
#endif

namespace gengram {
inline namespace GENGRAM_CAPABILITY {

constexpr int kLargestSize = 8;  // of an n-gram: 5^8 rows

GENGRAM_BODY constexpr int32_t power_of_five(int n) {
  int32_t power = 1;
  for (int i = 0; i < n; i++) power *= 5;
  return power;
}

// Windows, and the sections of packed tables: A (= C_N) at row 0, then C_(N-1) .. C_1, then B.
struct Geometry {
  int window;                          // W, tokens
  int largest;                         // N, the largest n-gram size
  int endings;                         // W - N + 1, n-grams of size N per window
  int last;                            // how far windows reach ahead: 0 if causal
  uint32_t sizes;                      // bit n is set if n-grams of size n are in use
  int32_t power[kLargestSize + 1];     // 5^n
  int32_t section[kLargestSize + 1];   // first row of C_m
  int32_t oldest;                      // first row of B
  int32_t rows;                        // of the whole table
};

inline Geometry make_geometry(int window, int largest, int last, uint32_t sizes, int32_t top_rows) {
  Geometry g{};
  g.window = window;
  g.largest = largest;
  g.endings = window - largest + 1;
  g.last = last;
  g.sizes = sizes;
  for (int n = 0; n <= largest; n++) g.power[n] = power_of_five(n);
  int32_t row = top_rows;
  for (int n = largest - 1; n >= 1; n--) {
    g.section[n] = row;
    row += g.power[n];
  }
  g.oldest = row;
  g.rows = row + (largest > 1 ? g.power[largest - 1] : 0);
  return g;
}

// One sequence of the batch. `context` earlier tokens stand in front of the `length` current ones.
struct Sequence {
  const int32_t* grams;   // (tokens,) row of the largest n-gram that ends here, no letter as 0
  const int32_t* runs;    // (tokens,) consecutive letters of the segment that end here
  const int32_t* top;     // (tokens,) row within section A of that n-gram
  const int32_t* behind;  // (tokens,) earlier tokens of the segment, or null: all
  const int32_t* ahead;   // (length,) later tokens of the segment, or null: all
  const bool* exists;     // (length,) false at padding, or null
  int64_t tokens, context, length;
};

// Row `row` of a batch.
GENGRAM_BODY Sequence sequence_of(const Tokens& t, int64_t row) {
  Sequence s;
  s.grams = t.grams + row * t.tokens;
  s.runs = t.runs + row * t.tokens;
  s.top = (t.top ? t.top : t.grams) + row * t.tokens;
  s.behind = t.behind ? t.behind + row * t.tokens : nullptr;
  s.ahead = t.ahead ? t.ahead + row * t.length : nullptr;
  s.exists = t.exists ? t.exists + row * t.length : nullptr;
  s.tokens = t.tokens;
  s.length = t.length;
  s.context = t.tokens - t.length;
  return s;
}

GENGRAM_BODY int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GENGRAM_BODY int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The token at which the window of position t ends.
GENGRAM_BODY int64_t window_end(const Geometry& g, const Sequence& s, int64_t t) { return s.context + t + g.last; }

// Whether the window is full of letters of one segment: then it is a plain sum of `endings` rows of A and one of B.
GENGRAM_BODY bool is_regular(const Geometry& g, const Sequence& s, int64_t t) {
  const int64_t end = window_end(g, s, t);
  return end < s.tokens && s.runs[end] >= g.window;
}

// The row of B of a regular window; only if the largest n-gram has more than one letter.
GENGRAM_BODY int32_t oldest_row(const Geometry& g, const Sequence& s, int64_t t) {
  return g.oldest + s.grams[window_end(g, s, t) - g.endings] % g.power[g.largest - 1];
}

// Whether a tap at `offset` stays inside the segment of position t.
GENGRAM_BODY bool is_in_segment(const Sequence& s, int64_t t, int64_t offset) {
  if (offset < 0) return !s.behind || s.behind[s.context + t] >= -offset;
  return offset == 0 || !s.ahead || s.ahead[t] >= offset;
}

// The tokens begin .. stop - 1 of a window that are there and belong to the position's segment.
struct Span {
  int64_t begin, stop;
};

GENGRAM_BODY Span window_span(const Geometry& g, const Sequence& s, int64_t t) {
  const int64_t here = s.context + t, end = window_end(g, s, t);
  Span span{larger(end - g.window + 1, 0), smaller(end + 1, s.tokens)};
  if (s.behind) span.begin = larger(span.begin, here - s.behind[here]);
  if (s.ahead) span.stop = smaller(span.stop, here + s.ahead[t] + 1);
  return span;
}

// (full count) / (count of valid n-grams of size n) of an irregular window, 0 for sizes that are not in use.
GENGRAM_BODY float irregular_weight(const Geometry& g, int n, int count) {
  return (g.sizes >> n & 1) && count ? float(g.window - n + 1) / float(count) : 0.f;
}

// weight[n] for all n.
GENGRAM_BODY void irregular_weights(const Geometry& g, const Sequence& s, const Span& span, float* weight) {
  for (int n = 0; n < kLargestSize + 2; n++) weight[n] = 0.f;
  for (int n = 1; n <= g.largest; n++) {
    if (!(g.sizes >> n & 1)) continue;
    int count = 0;
    for (int64_t j = span.begin + n - 1; j < span.stop; j++) count += s.runs[j] >= n;
    weight[n] = irregular_weight(g, n, count);
  }
}

// Size of the longest n-gram that ends at token j inside the span.
GENGRAM_BODY int longest_in_span(const Geometry& g, const Sequence& s, const Span& span, int64_t j) {
  return int(smaller(smaller(s.runs[j], j - span.begin + 1), g.largest));
}

// Weight of the row of C_m (A if m is the largest size) at an ending whose longest n-gram has size `longest` >= m.
GENGRAM_BODY float irregular_factor(const float* weight, int longest, int m) {
  return m < longest ? weight[m] - weight[m + 1] : weight[m];
}

// Calls f(row, weight) for the rows whose weighted sum is an irregular window, in a fixed order.
template <class F>
GENGRAM_BODY void for_each_irregular_row(const Geometry& g, const Sequence& s, int64_t t, F&& f) {
  const Span span = window_span(g, s, t);
  float weight[kLargestSize + 2];
  irregular_weights(g, s, span, weight);
  for (int64_t j = span.stop - 1; j >= span.begin; j--) {
    const int longest = longest_in_span(g, s, span, j);
    for (int m = 1; m <= longest; m++) {
      const float factor = irregular_factor(weight, longest, m);
      if (factor == 0.f) continue;
      f(m == g.largest ? s.top[j] : g.section[m] + s.grams[j] % g.power[m], factor);
    }
  }
}

// Entries of the rings that push_row needs.
GENGRAM_BODY int ring_entries(int endings) {
  int width = 1;
  while (2 * width <= endings) width *= 2;
  return 2 * width - 1;
}

// Adds the row of token j and returns the sum of the last `endings` rows. Partial sums of 1, 2, 4, .. rows are kept in
// rings, so the additions of a window are always the same ones in the same order, wherever the sweep began; nothing
// is ever subtracted. `ring` holds ring_entries(endings) values, `stride` apart.
template <int kEndings, class Vec>
GENGRAM_BODY Vec push_row(Vec row, Vec* ring, ptrdiff_t stride, int any_endings, int64_t j) {
  const int endings = kEndings ? kEndings : any_endings;
  Vec total{};
  bool is_first = true;
  int taken = 0;
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 8
#endif
  for (int width = 1; width <= endings; width *= 2) {
    Vec* level = ring + (width - 1) * stride;
    Vec* place = level + (j & (width - 1)) * stride;  // holds the sum of `width` rows up to token j - width
    const Vec earlier = *place;
    if (endings & width) {
      const Vec part = taken ? level[((j - taken) & (width - 1)) * stride] : row;
      total = is_first ? part : total + part;
      is_first = false;
      taken += width;
    }
    *place = row;
    row = row + earlier;
  }
  return total;
}

// What the gate needs of one position: sums over hidden of key^2, hidden * norm_weight * key, hidden^2.
struct GateSums {
  float key_square, product, query_square;
};

struct Gate {
  float logit, gate, rest;  // rest = 1 - gate, without cancellation
  float query_scale, key_scale;
};

GENGRAM_BODY Gate make_gate(const GateSums& sums, int64_t hidden, float eps) {
  Gate gate;
  gate.query_scale = 1.f / sqrtf(sums.query_square / float(hidden) + eps);
  gate.key_scale = 1.f / sqrtf(sums.key_square / float(hidden) + eps);
  gate.logit = sums.product * gate.query_scale * gate.key_scale / sqrtf(float(hidden));
  const float size = fabsf(gate.logit);
  float root = sqrtf(size < 1e-6f ? 1e-6f : size);  // what is not a number stays so, which fmaxf would hide
  root = gate.logit > 0.f ? root : (gate.logit < 0.f ? -root : gate.logit);
  gate.gate = 1.f / (1.f + expf(-root));
  gate.rest = 1.f / (1.f + expf(root));
  return gate;
}

// Factors of the gradients of query and key: grad_query = product * norm * key + query * query, and so on.
struct GateGradient {
  float product, query, key;
};

GENGRAM_BODY GateGradient differentiate_gate(const Gate& gate, float grad_gate, int64_t hidden) {
  const float size = fabsf(gate.logit);
  const float slope = size > 1e-6f ? 0.5f / sqrtf(size) : 0.f;
  const float grad_logit = grad_gate * gate.gate * gate.rest * slope;
  const float pull = grad_logit * gate.logit / float(hidden);
  return {grad_logit * gate.query_scale * gate.key_scale / sqrtf(float(hidden)),
          -pull * gate.query_scale * gate.query_scale, -pull * gate.key_scale * gate.key_scale};
}

}  // namespace GENGRAM_CAPABILITY
}  // namespace gengram
