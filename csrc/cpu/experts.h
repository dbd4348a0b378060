// Products with quantised weights, included by kernels.cpp once per instruction set. A product of few tokens is bound by
// the bytes of the weights: a row is read once, and multiplied with up to kTokens tokens while it is in registers.

constexpr int kTokens = 4;

typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Octets __attribute__((vector_size(16)));

inline Vec load(const int8_t* p) {
  Bytes narrow;
  memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(__builtin_convertvector(narrow, Ints), Vec);
}

inline Vec floats_of(Octets x) { return __builtin_convertvector(__builtin_convertvector(x, Ints), Vec); }

inline float value_of(const float* p) { return *p; }
inline float value_of(const Half* p) { return half_value(p->bits); }
inline float value_of(const BFloat16* p) { return bfloat16_value(p->bits); }

inline void put(float* p, float x) { *p = x; }
inline void put(Half* p, float x) { p->bits = half_bits(x); }
inline void put(BFloat16* p, float x) { p->bits = bfloat16_bits(x); }

// One row of int8 with kCount tokens: sums over columns, by 16 lanes and two of them in turn.
template <int kCount>
inline void dot_int8(const int8_t* row, const float* x, int64_t columns, float* sums) {
  Vec even[kCount] = {}, odd[kCount] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    const Vec first = load(row + c), second = load(row + c + kLanes);
    for (int t = 0; t < kCount; t++) {
      even[t] += first * load(x + t * columns + c);
      odd[t] += second * load(x + t * columns + c + kLanes);
    }
  }
  if (c < columns) {
    const Vec last = load(row + c);
    for (int t = 0; t < kCount; t++) even[t] += last * load(x + t * columns + c);
  }
  for (int t = 0; t < kCount; t++) sums[t] = sum_lanes(even[t] + odd[t]);
}

// One row of 4-bit numbers: byte j of a group's 16 holds its number j and, above, its number j + 16; each is 8 too large.
template <int kCount, class T>
inline void dot_int4(const uint8_t* row, const T* scales, const float* x, const float* group_sums, int64_t columns, float* sums) {
  Vec total[kCount] = {};
  float surplus[kCount] = {};
  const int64_t groups = columns / (2 * kLanes);
  for (int64_t g = 0; g < groups; g++) {
    Octets pairs;
    memcpy(&pairs, row + g * kLanes, sizeof pairs);
    const Vec low = floats_of(pairs & uint8_t(15)), high = floats_of(pairs >> 4);
    const float scale = value_of(scales + g);
    for (int t = 0; t < kCount; t++) {
      const float* own = x + t * columns + g * 2 * kLanes;
      total[t] += (low * load(own) + high * load(own + kLanes)) * scale;
      surplus[t] += scale * group_sums[t * groups + g];
    }
  }
  for (int t = 0; t < kCount; t++) sums[t] = sum_lanes(total[t]) - 8.f * surplus[t];
}

template <class F>
inline void with_count(int64_t count, F f) {
  switch (count) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, kTokens>());
  }
}

template <class T>
void product_of(const ProductArguments& a, Parallel parallel) {
  const int64_t groups = a.columns / (2 * kLanes), block = 32;
  Buffer<float> x(a.tokens * a.columns), group_sums(a.is_int4 ? a.tokens * groups : 0);
  for (int64_t i = 0; i < a.tokens * a.columns; i += kLanes) store(&x[i], load(static_cast<const T*>(a.x) + i));
  for (int64_t g = 0; a.is_int4 && g < a.tokens * groups; g++)
    group_sums[g] = sum_lanes(load(&x[g * 2 * kLanes]) + load(&x[g * 2 * kLanes + kLanes]));
  const T* scale = static_cast<const T*>(a.scale);
  parallel_for(parallel, (a.rows + block - 1) / block, [&](int64_t task) {
    for (int64_t row = task * block; row < smaller(a.rows, (task + 1) * block); row++)
      for (int64_t first = 0; first < a.tokens; first += kTokens)
        with_count(smaller(a.tokens - first, kTokens), [&](auto constant) {
          constexpr int kCount = decltype(constant)::value;
          const float* own = &x[first * a.columns];
          float sums[kCount];
          if (a.is_int4) {
            dot_int4<kCount>(static_cast<const uint8_t*>(a.numbers) + row * a.columns / 2, scale + row * groups, own,
                             &group_sums[first * groups], a.columns, sums);
          } else {
            dot_int8<kCount>(static_cast<const int8_t*>(a.numbers) + row * a.columns, own, a.columns, sums);
            for (int t = 0; t < kCount; t++) sums[t] *= value_of(scale + row);
          }
          for (int t = 0; t < kCount; t++) put(static_cast<T*>(a.out) + (first + t) * a.rows + row, sums[t]);
        });
  });
}

void product(const ProductArguments& a, Parallel parallel) {
  with_type(a.type, [&](auto* t) { product_of<decltype(type_of(t))>(a, parallel); });
}
