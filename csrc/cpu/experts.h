// Products with quantised weights, included by kernels.cpp once per instruction set. A product of few tokens is bound by
// the bytes of the weights: a row is read once, and multiplied with up to kTokens tokens while it is in registers.

constexpr int kTokens = 4;

typedef uint8_t Octets __attribute__((vector_size(16)));

// As many floats as a register holds: GCC keeps wider vectors in memory.
#if defined(__AVX512F__)
constexpr int kWide = 16;
#else
constexpr int kWide = 8;
#endif
typedef float Wide __attribute__((vector_size(4 * kWide)));

inline Wide wide(const float* p) {
  Wide x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline Wide wide(const int8_t* p) {
#if defined(__AVX512F__)
  return (Wide)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Wide)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Wide x;
  for (int i = 0; i < kWide; i++) x[i] = p[i];
  return x;
#endif
}

// Bytes first .. first + kWide of 16.
template <int kFirst>
inline Wide wide(Octets octets) {
#if defined(__AVX512F__)
  return (Wide)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)octets));
#elif defined(__AVX2__)
  return (Wide)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)octets, kFirst)));
#else
  Wide x;
  for (int i = 0; i < kWide; i++) x[i] = octets[kFirst + i];
  return x;
#endif
}

inline float sum_lanes(const float* lanes) {
  float sums[kWide / 2];
  for (int i = 0; i < kWide / 2; i++) sums[i] = lanes[i] + lanes[i + kWide / 2];
  for (int width = kWide / 4; width; width /= 2)
    for (int i = 0; i < width; i++) sums[i] += sums[i + width];
  return sums[0];
}

inline float total_of(Wide x) {
  float lanes[kWide];
  memcpy(lanes, &x, sizeof lanes);
  return sum_lanes(lanes);
}

inline float value_of(const float* p) { return *p; }
inline float value_of(const Half* p) { return half_value(p->bits); }
inline float value_of(const BFloat16* p) { return bfloat16_value(p->bits); }

inline void put(float* p, float x) { *p = x; }
inline void put(Half* p, float x) { p->bits = half_bits(x); }
inline void put(BFloat16* p, float x) { p->bits = bfloat16_bits(x); }

// One row of int8 with kCount tokens: sums over columns, in two registers in turn.
template <int kCount>
inline void dot_int8(const int8_t* row, const float* x, int64_t columns, float* sums) {
  Wide even[kCount] = {}, odd[kCount] = {};
  int64_t c = 0;
  for (; c + 2 * kWide <= columns; c += 2 * kWide) {
    const Wide first = wide(row + c), second = wide(row + c + kWide);
    for (int t = 0; t < kCount; t++) {
      even[t] += first * wide(x + t * columns + c);
      odd[t] += second * wide(x + t * columns + c + kWide);
    }
  }
  if (c < columns) {
    const Wide last = wide(row + c);
    for (int t = 0; t < kCount; t++) even[t] += last * wide(x + t * columns + c);
  }
  for (int t = 0; t < kCount; t++) sums[t] = total_of(even[t] + odd[t]);
}

// One row of 4-bit numbers: byte j of a group's 16 holds its number j and, above, its number j + 16; each is 8 too large.
template <int kCount, class T>
inline void dot_int4(const uint8_t* row, const T* scales, const float* x, const float* group_sums, int64_t columns, float* sums) {
  Wide total[kCount] = {};
  float surplus[kCount] = {};
  const int64_t groups = columns / (2 * kLanes);
  for (int64_t g = 0; g < groups; g++) {
    Octets pairs;
    memcpy(&pairs, row + g * kLanes, sizeof pairs);
    const Octets low = pairs & uint8_t(15), high = pairs >> 4;
    const float scale = value_of(scales + g);
    for (int t = 0; t < kCount; t++) {
      const float* own = x + t * columns + g * 2 * kLanes;
      Wide part = wide<0>(low) * wide(own) + wide<0>(high) * wide(own + kLanes);
      if constexpr (kWide < kLanes) part += wide<8>(low) * wide(own + 8) + wide<8>(high) * wide(own + kLanes + 8);
      total[t] += part * scale;
      surplus[t] += scale * group_sums[t * groups + g];
    }
  }
  for (int t = 0; t < kCount; t++) sums[t] = total_of(total[t]) - 8.f * surplus[t];
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
