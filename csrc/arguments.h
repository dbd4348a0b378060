// What the kernels of every device take: plain pointers and numbers, no PyTorch. Pointers are of the kernels' device.
#pragma once

#include <cstdint>

namespace gengram {

enum class Type : int { kFloat, kHalf, kBFloat16 };

// The tokens of a batch; see Sequence in motif_memory.h.
struct Tokens {
  const int32_t *grams, *runs, *top, *behind, *ahead;
  const bool* exists;
  int64_t batch, tokens, length;
};

struct Windows {
  int window, largest, last;
  uint32_t sizes;
};

// Packed tables (slabs, rows, slab_width), the last dimension dense.
struct Tables {
  const void* rows;
  Type type;
  int64_t top_rows, row_stride, slab_stride, slab_width;
  float scale;
};

// Key and value from packed tables, or as they are, (batch, length, hidden).
struct Source {
  const Tables* tables;
  const void *key, *value;
  Type type;
};

struct Layer {
  int64_t hidden;
  const float* norm_weight;  // (hidden,)
  const float* conv_weight;  // (taps, hidden) or null
  int64_t taps, dilation, reach_back;
  float eps;
};

struct ForwardArguments {
  Tokens tokens;
  Windows windows;
  Source source;
  Layer layer;
  const void* hidden_states;  // (batch, length, hidden)
  Type type;                  // of hidden states and residual
  const float* history;       // (batch, reach_back, hidden) or null
  void* residual;             // (batch, length, hidden)
  float* gate;                // (batch, length)
  float* gated;               // (batch, kept, hidden): the convolution's last inputs
  int64_t kept;
};

struct BackwardArguments {
  Tokens tokens;
  Windows windows;
  Source source;
  Layer layer;
  const void *grad_residual, *hidden_states;  // (batch, length, hidden)
  const float* grad_gate;                     // (batch, length) or null
  Type type;                                  // of hidden states and their gradients
  void* grad_hidden;                          // (batch, length, hidden)
  float* grad_rows;                           // (slabs, rows, slab_width), zeroed; with tables
  float *grad_key, *grad_value;               // (batch, length, hidden); without
  float* grad_norm;                           // (hidden,)
  float* grad_conv;                           // (taps, hidden) or null
};

struct FeatureArguments {
  Tokens tokens;
  Windows windows;
  const int* sizes;           // n of every table
  int64_t tables, width;
  const void* const* rows;    // one (5^n, width) per size
  Type type;                  // of tables and features
  void* features;             // (batch, length, tables * width)
  const void* grad_features;  // backward
  float* const* grad_rows;    // backward: one (5^n, width), zeroed
};

// Tokens times the transpose of quantised weights; see modeling_gengram/quantized_experts.py.
struct ProductArguments {
  const void* x;        // (tokens, columns)
  const void* numbers;  // int8 (rows, columns), or 4-bit (rows, columns / 2 bytes)
  const void* scale;    // (rows,), or 4-bit (rows, columns / 32)
  void* out;            // (tokens, rows)
  Type type;            // of x, scale and out
  int64_t tokens, rows, columns;
  bool is_int4;
};

}  // namespace gengram
